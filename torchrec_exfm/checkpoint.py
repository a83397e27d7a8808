"""Checked checkpoints that any tool can read with ``torch.distributed.checkpoint``.

A checkpoint is an ordinary folder of ``torch.distributed.checkpoint`` (DCP), plus a metadata.json
(:mod:`torchrec_exfm._manifest`). That file is written last, and read instead of DCP's pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.utils import _create_file_view  # not public

from torchrec_exfm._compat import shape_and_dtype
from torchrec_exfm._manifest import METADATA, Place, describe_checkpoint, refusal
from torchrec_exfm._manifest import read_metadata as read_metadata
from torchrec_exfm._ranks import T, distributed, gather_from_ranks, on_rank_0, rank, world_size

_MAX_CACHED_BYTES = 2**30


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a model's state, each rank its own part.

    Every rank must call it, with a folder that all ranks share. Without ``torch.distributed`` it
    runs in one process. ``metadata.json`` comes last and atomically, so a killed save leaves a
    folder that ``load_checkpoint`` refuses. A save that fails removes what it has written. The
    files of an existing checkpoint, whatever tool wrote it, are never overwritten.
    """
    folder, files = Path(folder), _Files()
    on_every_rank(lambda: _check_tensors(state))
    on_rank_0(lambda: _check_new(folder))
    writer = dcp.FileSystemWriter(folder, overwrite=False)
    writer.fs = files
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            metadata = dcp.save(
                dict(state),
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(False, flatten_sharded_tensors=False),
                no_dist=not distributed(),
            )
        described = dict(itertools.chain(*gather_from_ranks(files.described())))
        document = describe_checkpoint(metadata, described)
        on_rank_0(lambda: _write_atomically(files, folder / METADATA, json.dumps(document)))
    except BaseException as error:
        files.remove(folder)
        if isinstance(error, dcp.CheckpointException):  # DCP's own, and no Exception
            failure, _ = error.failures[min(error.failures)]
            raise failure from None
        raise


def load_checkpoint(
    folder: Path, state: Mapping[str, Any], metadata: dcp.Metadata | None = None
) -> None:
    """Read a checkpoint into a state, in place, with any number of ranks and any sharding.

    Every rank must call it. Only tensors are unpickled, by ``torch.load`` with
    ``weights_only=True``, and nothing is opened outside the folder. Every rank checks all that it
    will read, and a share of the files' digests, before any rank copies anything: after an error
    the state is unchanged on every rank. Further tensors of the checkpoint are not read.

    Args:
        folder: the checkpoint.
        state: tensors by name, to be filled.
        metadata: what ``open_checkpoint`` returned for the folder, if it was called.
    """
    saved = open_checkpoint(folder) if metadata is None else metadata
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    cache: dict[Place, Tensor] = {}

    def check() -> dict[Place, list[dcp.ReadItem]]:
        _check_agreement(state, saved)
        planner.set_up_planner(dict(state), saved, rank() == 0)
        items = defaultdict[Place, list[dcp.ReadItem]](list)
        for item in planner.create_local_plan().items:
            index = item.storage_index
            items[saved.storage_data[index.fqn][index.index]].append(item)
        read_bytes = 0
        for place in items:
            chunk = _read_chunk(place)
            read_bytes += chunk.nbytes
            if read_bytes <= _MAX_CACHED_BYTES:  # others are read twice, to bound host memory
                cache[place] = chunk
        return items

    def copy(items: Mapping[Place, Sequence[dcp.ReadItem]]) -> None:
        for place in items:
            chunk = cache.pop(place) if place in cache else _read_chunk(place)
            for item in items[place]:
                pairs = zip(item.storage_offsets, item.lengths, strict=True)
                part = chunk[tuple(slice(start, start + length) for start, length in pairs)]
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)

    items = on_every_rank(check)
    on_every_rank(lambda: copy(items))


def open_checkpoint(folder: Path) -> dcp.Metadata:
    """Check a checkpoint, each rank a share of its files; return its metadata. Collective."""
    return on_every_rank(lambda: read_metadata(folder, slice(rank(), None, world_size())))


def on_every_rank(function: Callable[[], T]) -> T:
    """Call a function on every rank; raise the first error of any rank on all of them."""
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    failures = gather_from_ranks(failure)
    failures[rank()] = failure  # this rank's with its traceback, which pickling drops
    for rank_failure in failures:
        if rank_failure is not None:
            raise rank_failure
    return cast(T, result)


class _Files(FileSystem):
    """The file system of one save: it records the files that this rank writes."""

    def __init__(self) -> None:
        self._written: dict[str, _DigestingFile] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        path = Path(path)
        # A killed save may have left a file. Unlink it: truncating would destroy a link's target.
        path.unlink(missing_ok=True)
        with _DigestingFile(io.FileIO(path, "x")) as stream:
            self._written[path.name] = stream
            try:
                yield stream
            except RuntimeError as error:  # torch.save's clean-up hides a cause such as a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def described(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the files by their final names, with sizes and digests."""
        return [
            (name.removesuffix(".tmp"), {"size": stream.size, "sha256": stream.digest.hexdigest()})
            for name, stream in self._written.items()
        ]

    def remove(self, folder: Path) -> None:
        """Delete what was written, and the folder if it is empty then; ignore failures."""
        for name in self._written:
            for path in (folder / name, folder / name.removesuffix(".tmp")):
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


class _DigestingFile(io.BufferedWriter):
    """A file written in order, hashed on the way: no second pass over gigabytes."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return super().write(data)


def _write_atomically(files: _Files, path: Path, text: str) -> None:
    """Write a file that others see complete or not at all, and that survives a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with files.create_stream(temporary, "wb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # a rename lasts once its folder is synced
    try:
        os.fsync(folder)
    except BaseException:
        path.unlink()  # before raising: then other ranks delete the files that it describes
        raise
    finally:
        os.close(folder)


def _read_chunk(place: Place) -> Tensor:
    try:
        with place.path.open("rb") as stream:
            view: Any = _create_file_view(cast(Any, stream), place.offset, place.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        problem = f"what torch.load with weights_only=True refuses ({type(error).__name__})"
        raise refusal(place.path, f"hold a tensor at byte {place.offset}", problem) from error
    expected = f"a tensor {place.dtype} {list(place.sizes)}"
    received = _describe(tensor) if type(tensor) is Tensor else f"a {type(tensor).__name__}"
    if received != expected:
        raise refusal(place.path, f"hold {expected} at byte {place.offset}", received)
    return cast(Tensor, tensor)


def _check_agreement(state: Mapping[str, Any], metadata: dcp.Metadata) -> None:
    _check_tensors(state)
    saved = metadata.state_dict_metadata
    for key, tensor in state.items():
        received = _describe(saved[key]) if key in saved else "none of this key"
        expected = _describe(tensor)
        if received != expected:
            raise ValueError(
                f"the checkpoint's {key!r} should be {expected}; received {received}; load it into "
                "the model that it was saved from"
            )


def _describe(tensor: Any) -> str:
    """Return the dtype and shape, which must agree, of a tensor or of a checkpoint's record."""
    if isinstance(tensor, dcp.TensorStorageMetadata):
        dtype, shape = tensor.properties.dtype, tensor.size
    else:
        shape, dtype = shape_and_dtype(tensor)
    return f"a tensor {dtype} {list(shape)}"


def _check_new(folder: Path) -> None:
    for name in (METADATA, ".metadata"):
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder} should hold no checkpoint; received one with {name}; save to a new "
                "folder"
            )


def _check_tensors(state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise TypeError(
                f"the state should hold tensors by name; received {key!r}, of type "
                f"{type(value).__name__}; leave out what is no weight"
            )

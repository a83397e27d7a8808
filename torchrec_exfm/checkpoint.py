"""Checkpoints of a model, sharded or not, that are read without unpickling what others wrote.

``torch.distributed.checkpoint`` (DCP) describes its files in a pickle, ``.metadata``, and whoever
reads a pickle runs what it says. Here ``metadata.json`` describes DCP's data files instead::

    {"format": "torchrec_exfm.checkpoint", "version": 1, "tensors": {"over.weight": {
        "shape": [8, 4], "dtype": "float32", "chunks": [{"offsets": [0, 0], "sizes": [8, 4],
            "file": "__0_0.distcp", "offset": 0, "length": 1308}]}}}

A chunk begins at ``offsets`` in the tensor and at byte ``offset`` in the file. The chunks of a
tensor are disjoint and cover it; a tensor of no elements has none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view  # not public
from torch.futures import Future

from torchrec_exfm._compat import ShardedTensor
from torchrec_exfm._ranks import distributed

__all__ = ["METADATA", "load_checkpoint", "read_metadata", "save_checkpoint"]

METADATA = "metadata.json"
_FORMAT = "torchrec_exfm.checkpoint"
_VERSION = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_T = TypeVar("_T")


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a model's state, each rank what it has of it.

    Every rank must call it, with one folder that all of them see; without ``torch.distributed`` it
    is one process. ``metadata.json`` comes last and at once, so that a save which did not end
    leaves a folder that ``load_checkpoint`` refuses, and into which one may save again.

    Args:
        folder: a new one, or one that holds no checkpoint.
        state: a model's ``state_dict()``, of tensors, ShardedTensors and DTensors.

    Raises:
        TypeError: if something in the state is no tensor.
        FileExistsError: if the folder holds a checkpoint: the files of one are never written over.
        OSError: if a file could not be written.
    """
    with _errors_of_any_rank():
        dcp.save(
            dict(state),
            storage_writer=_Writer(Path(folder), overwrite=False),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not distributed(),
        )


def load_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into a state, in place, on any number of ranks and with any sharding.

    Every rank must call it. Nothing is unpickled but tensors, by ``torch.load`` with
    ``weights_only=True``, and nothing is opened outside the folder. Files and state are checked
    before anything is copied; after an error in the bytes of a chunk the state is half loaded.

    Args:
        folder: what ``save_checkpoint`` wrote.
        state: the ``state_dict()`` of a model; what else the checkpoint holds is not read.

    Raises:
        TypeError: if something in the state is no tensor.
        FileNotFoundError: if there is no ``metadata.json``, as after a save that did not end.
        ValueError: if a file is missing, truncated or another than was saved, or has a name that
            leads out of the folder; if the checkpoint has no tensor of a key, or one of another
            shape or dtype.
    """
    with _errors_of_any_rank():
        dcp.load(
            state,
            storage_reader=_Reader(Path(folder)),
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not distributed(),
        )


class _SavePlanner(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> dcp.SavePlan:
        _check_tensors(self.state_dict)
        return super().create_local_plan()


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def create_local_plan(self) -> dcp.LoadPlan:
        _check_tensors(self.state_dict)
        saved = cast(dcp.Metadata, self.metadata).state_dict_metadata
        for key, tensor in self.state_dict.items():
            found = _described(saved[key]) if key in saved else "none of this key"
            wanted = _described(tensor)
            if found != wanted:
                raise ValueError(
                    f"the checkpoint's {key!r} should be {wanted}; received {found}; load it into "
                    "the model that it was saved from"
                )
        return super().create_local_plan()


class _Writer(dcp.FileSystemWriter):
    """Writes DCP's data files, and metadata.json in place of its pickle."""

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        folder = Path(self.path)
        for name in (METADATA, ".metadata"):
            if os.path.lexists(folder / name):
                raise FileExistsError(
                    f"{folder} should hold no checkpoint; received one with {name}; save to a "
                    "new folder"
                )
        return super().prepare_local_plan(plan)

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        infos = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, dcp.TensorStorageMetadata)
            chunks: list[dict[str, Any]] = []
            for chunk in tensor.chunks:
                if math.prod(chunk.sizes):
                    info = infos[MetadataIndex(key, chunk.offsets)]  # its attributes are not public
                    part = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                    part |= {"file": info.relative_path, "offset": info.offset}
                    chunks.append(part | {"length": info.length})
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[key] = {"shape": list(tensor.size), "dtype": dtype, "chunks": chunks}
        document = {"format": _FORMAT, "version": _VERSION, "tensors": tensors}
        _write_at_once(Path(self.path) / METADATA, json.dumps(document))


class _Reader(dcp.FileSystemReader):
    """Reads metadata.json in place of DCP's pickle, and nothing but tensors."""

    _error: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        # An error waits until the next step: raised here, it would make DCP ask for metadata of
        # this rank alone, which other ranks do not wait for, and end as a part of another error.
        try:
            return read_metadata(Path(self.path))
        except Exception as error:
            self._error = error
            return dcp.Metadata({}, storage_data={})

    def set_up_storage_reader(
        self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if self._error is not None:
            raise self._error
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            chunk = _read_chunk(self.storage_data[item.storage_index])
            pairs = zip(item.storage_offsets, item.lengths, strict=True)
            part = chunk[tuple(slice(start, start + length) for start, length in pairs)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Place(NamedTuple):
    """Where a chunk is, and what it should be."""

    path: Path
    offset: int
    length: int
    sizes: torch.Size
    dtype: torch.dtype


def read_metadata(folder: Path) -> dcp.Metadata:
    """What a checkpoint holds, and where; an error if its files can't be all of that."""
    path = folder / METADATA
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} should hold {METADATA}, which save_checkpoint writes last; received none; "
            "load another checkpoint, since this is none or its save did not end"
        )
    path, _ = _inside(folder, METADATA)
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "be JSON", f"what does not parse: {error}") from error
    found = _field(path, document, "format", str), _field(path, document, "version", int)
    if found != (_FORMAT, _VERSION):
        raise _refusal(path, f"be of the format {_FORMAT}, version {_VERSION}", f"{found}")
    inside = functools.cache(functools.partial(_inside, folder))
    metadata = dcp.Metadata({}, storage_data={})
    for key, record in _field(path, document, "tensors", dict).items():
        tensor, places = _tensor(f"{path}: {key!r}", record, inside)
        metadata.state_dict_metadata[key] = tensor
        for chunk, place in zip(tensor.chunks, places, strict=True):
            metadata.storage_data[MetadataIndex(key, chunk.offsets)] = place
    return metadata


def _tensor(
    what: str, record: Any, inside: Callable[[str], tuple[Path, int]]
) -> tuple[dcp.TensorStorageMetadata, list[_Place]]:
    shape, name = _counts(what, record, "shape"), _field(what, record, "dtype", str)
    if name not in _DTYPES:
        raise _refusal(what, "be of a dtype of torch", repr(name))
    dtype = _DTYPES[name]
    chunks: list[dcp.ChunkStorageMetadata] = []
    places: list[_Place] = []
    for chunk in _field(what, record, "chunks", list):
        sizes = _counts(what, chunk, "sizes")
        chunks.append(dcp.ChunkStorageMetadata(_counts(what, chunk, "offsets"), sizes))
        path, size = inside(_field(what, chunk, "file", str))
        offset, length = _field(what, chunk, "offset", int), _field(what, chunk, "length", int)
        if not 0 <= offset < offset + length <= size:
            raise _refusal(path, f"hold {length} bytes from byte {offset} on", f"{size} bytes")
        places.append(_Place(path, offset, length, sizes, dtype))
    if not _covered_once(shape, chunks):
        received = f"{[(*chunk.offsets, *chunk.sizes) for chunk in chunks]!r:.80}"
        raise _refusal(what, f"have chunks that cover {list(shape)} once", received)
    return dcp.TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks), places


def _read_chunk(place: _Place) -> Tensor:
    try:
        with place.path.open("rb") as stream:
            view: Any = _create_file_view(cast(Any, stream), place.offset, place.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        problem = f"what torch.load with weights_only=True refuses ({type(error).__name__})"
        raise _refusal(place.path, f"hold a tensor at byte {place.offset}", problem) from error
    wanted = f"a tensor {place.dtype} {list(place.sizes)}"
    received = _described(tensor) if type(tensor) is Tensor else f"a {type(tensor).__name__}"
    if received != wanted:
        raise _refusal(place.path, f"hold {wanted} at byte {place.offset}", received)
    return cast(Tensor, tensor)


def _described(tensor: Any) -> str:
    """A tensor, or what the checkpoint says of one, by what must agree."""
    if isinstance(tensor, dcp.TensorStorageMetadata):
        dtype, shape = tensor.properties.dtype, tensor.size
    elif isinstance(tensor, ShardedTensor):  # which warns where it is asked itself
        dtype, shape = tensor.metadata().tensor_properties.dtype, tensor.metadata().size
    else:
        dtype, shape = tensor.dtype, tensor.shape
    return f"a tensor {dtype} {list(shape)}"


def _check_tensors(state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise TypeError(
                f"the state should hold tensors by name; received {key!r}, of type "
                f"{type(value).__name__}; leave out what is no weight"
            )


def _covered_once(shape: Sequence[int], chunks: Sequence[dcp.ChunkStorageMetadata]) -> bool:
    """Whether the chunks are disjoint, not empty, and cover the shape."""
    volume = 0
    active: list[dcp.ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            return False
        bounds = zip(chunk.offsets, chunk.sizes, shape, strict=True)
        if not all(offset + size <= whole and size for offset, size, whole in bounds):
            return False
        active = [other for other in active if _meet(other, chunk, dims=1)]
        if any(_meet(other, chunk, dims=len(shape)) for other in active):
            return False
        active.append(chunk)
        volume += math.prod(chunk.sizes)
    return volume == math.prod(shape)


def _meet(one: dcp.ChunkStorageMetadata, other: dcp.ChunkStorageMetadata, dims: int) -> bool:
    """Whether two chunks share indices in each of the first dimensions."""
    pairs = list(zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True))
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in pairs[:dims])


def _inside(folder: Path, name: str) -> tuple[Path, int]:
    """The path and size of a file of the folder itself."""
    path = folder / name
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise _refusal(f"a file of {folder}", "have a plain name", repr(name))
    if not path.is_file():
        raise _refusal(path, "be a file", "none")
    if path.resolve().parent != folder.resolve():
        raise _refusal(path, "be a file in its folder", f"a link to {path.resolve()}")
    return path, path.stat().st_size


def _field(what: object, record: Any, name: str, kind: type[_T]) -> _T:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind:
        raise _refusal(what, f"have {name!r}, of type {kind.__name__}", f"{value!r:.80}")
    return value


def _counts(what: object, record: Any, name: str) -> torch.Size:
    values = _field(what, record, name, list)
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise _refusal(what, f"have counts as {name!r}", f"{values!r:.80}")
    return torch.Size(values)


def _refusal(what: object, should: str, received: str) -> ValueError:
    return ValueError(
        f"{what} should {should}; received {received}; load a checkpoint as save_checkpoint left it"
    )


def _write_at_once(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all, and that a crash does not take back."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _errors_of_any_rank() -> Iterator[None]:
    """On every rank the error of the first that failed, in place of DCP's own, no Exception."""
    failure: BaseException | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.CheckpointException as error:
            failure, _ = error.failures[min(error.failures)]
    if failure is not None:
        raise failure

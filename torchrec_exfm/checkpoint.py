"""Checkpoints that any tool reads with ``torch.distributed.checkpoint`` (DCP), and that we check.

A checkpoint is an ordinary folder of DCP. DCP describes it in a pickle, ``.metadata``, and whoever
reads a pickle runs what it says. So ``metadata.json`` says the same for us, with a digest of every
file::

    {"format": "torchrec_exfm.checkpoint", "version": 2,
     "files": {"__0_0.distcp": {"size": 1308, "sha256": "5d41..."}, ".metadata": {...}},
     "tensors": {"over.weight": {"shape": [8, 4], "dtype": "float32", "chunks": [
         {"offsets": [0, 0], "sizes": [8, 4], "file": "__0_0.distcp", "offset": 0, "length": 1308}
     ]}},
     "sha256": "9b74..."}

A chunk begins at ``offsets`` in the tensor and at byte ``offset`` in the file. The chunks of a
tensor are disjoint and cover it; a tensor of no elements has none. The last digest is that of
``json.dumps`` of all the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.utils import _create_file_view  # not public

from torchrec_exfm._compat import ShardedTensor
from torchrec_exfm._ranks import distributed, of_each_rank, on_rank_0, rank, world_size

__all__ = [
    "METADATA",
    "fits",
    "load_checkpoint",
    "on_every_rank",
    "open_checkpoint",
    "read_metadata",
    "refusal",
    "save_checkpoint",
]

METADATA = "metadata.json"
_FORMAT = "torchrec_exfm.checkpoint"
_VERSION = 2
_MAX_METADATA_BYTES = 2**28  # some 2 million chunks
_MAX_KEPT_BYTES = 2**30
_PRIME = 2**61 - 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_T = TypeVar("_T")


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a model's state, each rank what it has of it.

    Every rank must call it, with one folder that all of them see; without ``torch.distributed`` it
    is one process. ``metadata.json`` comes last and at once, so that a save that was killed leaves
    a folder that ``load_checkpoint`` refuses. A save that fails removes what it has written.

    Args:
        folder: a new one, or one that holds no checkpoint.
        state: a model's ``state_dict()``, of tensors, ShardedTensors and DTensors.

    Raises:
        TypeError: if something in the state is no tensor.
        FileExistsError: if the folder holds a checkpoint, of any tool: the files of one are never
            written over.
        OSError: if a file could not be written.
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
        described = dict(itertools.chain(*of_each_rank(files.described())))
        document = _document(metadata, described)
        on_rank_0(lambda: _write_at_once(files, folder / METADATA, json.dumps(document)))
    except BaseException as error:
        files.remove(folder)
        if isinstance(error, dcp.CheckpointException):  # DCP's own, and no Exception
            failure, _ = error.failures[min(error.failures)]
            raise failure from None
        raise


def load_checkpoint(
    folder: Path, state: Mapping[str, Any], metadata: dcp.Metadata | None = None
) -> None:
    """Read a checkpoint into a state, in place, on any number of ranks and with any sharding.

    Every rank must call it. Nothing is unpickled but tensors, by ``torch.load`` with
    ``weights_only=True``, and nothing is opened outside the folder. Every rank checks all that it
    will read, and a share of the files' digests, before any of them copies anything.

    Args:
        folder: what ``save_checkpoint`` wrote.
        state: the ``state_dict()`` of a model; what else the checkpoint holds is not read.
        metadata: what ``open_checkpoint`` returned for the folder, if it was called.

    Raises:
        TypeError: if something in the state is no tensor.
        FileNotFoundError: if there is no ``metadata.json``, as after a save that did not end.
        ValueError: if a file is missing or another than was saved, or has a name that leads out of
            the folder; if the checkpoint has no tensor of a key, or one of another shape or dtype.
            The state is as before then, on every rank.
    """
    saved = open_checkpoint(folder) if metadata is None else metadata
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    kept: dict[_Place, Tensor] = {}

    def check() -> dict[_Place, list[dcp.ReadItem]]:
        _check_agreement(state, saved)
        planner.set_up_planner(dict(state), saved, rank() == 0)
        items = defaultdict[_Place, list[dcp.ReadItem]](list)
        for item in planner.create_local_plan().items:
            index = item.storage_index
            items[saved.storage_data[index.fqn][index.index]].append(item)
        kept_bytes = 0
        for place in items:
            chunk = _read_chunk(place)
            kept_bytes += chunk.nbytes
            if kept_bytes <= _MAX_KEPT_BYTES:  # else read again, rather than fill the memory
                kept[place] = chunk
        return items

    def copy(items: Mapping[_Place, Sequence[dcp.ReadItem]]) -> None:
        for place in items:
            chunk = kept.pop(place) if place in kept else _read_chunk(place)
            for item in items[place]:
                pairs = zip(item.storage_offsets, item.lengths, strict=True)
                part = chunk[tuple(slice(start, start + length) for start, length in pairs)]
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)

    checked = on_every_rank(check)
    on_every_rank(lambda: copy(checked))


def open_checkpoint(folder: Path) -> dcp.Metadata:
    """Check a checkpoint on all ranks, each a share of its files; the errors of ``read_metadata``.

    Every rank must call it.
    """
    return on_every_rank(lambda: read_metadata(folder, slice(rank(), None, world_size())))


def read_metadata(folder: Path, share: slice = slice(None)) -> dcp.Metadata:
    """Read what a checkpoint holds, and where (``storage_data``: a place for each chunk, by key).

    Args:
        folder: of a checkpoint.
        share: of its files, those whose digests are compared; sizes are for all of them.

    Raises:
        FileNotFoundError: if there is no ``metadata.json``.
        ValueError: if the files are not what it says, or can't be.
    """
    path = folder / METADATA
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} should hold {METADATA}, which save_checkpoint writes last; received none; "
            "load another checkpoint, since this is none or its save did not end"
        )
    document = _parsed(path)
    paths = {
        name: _check_file(folder, name, record["size"])
        for name, record in document["files"].items()
    }
    metadata = dcp.Metadata({}, storage_data={})
    for key, record in document["tensors"].items():
        tensor, places = _tensor(f"{path}: {key!r}", record, paths)
        metadata.state_dict_metadata[key] = tensor
        metadata.storage_data[key] = places
    _check_places(path, document["files"], itertools.chain(*metadata.storage_data.values()))
    for name in list(paths)[share]:
        wanted, received = document["files"][name]["sha256"], _digest_of_file(paths[name])
        if received != wanted:
            raise refusal(paths[name], f"have the SHA-256 {wanted}", received)
    return metadata


def on_every_rank(function: Callable[[], _T]) -> _T:
    """Call a function on every rank; an error of any rank is raised on all of them."""
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    failures = of_each_rank(failure)
    failures[rank()] = failure  # with its traceback, which no other rank's has
    for each in failures:
        if each is not None:
            raise each
    return cast(_T, result)


def fits(value: Any, kind: Any) -> bool:
    """Whether what JSON parsed to is of a kind.

    A kind is a type, a predicate, ``(one, or another)``, ``[of each]``, ``{str: of each}`` or
    ``{name: of this field}``, which may have others beside it.
    """
    if isinstance(kind, type):
        return type(value) is kind  # True is no int
    if isinstance(kind, tuple):
        return any(fits(value, each) for each in kind)
    if isinstance(kind, list):
        return type(value) is list and all(fits(each, kind[0]) for each in value)
    if isinstance(kind, dict) and str in kind:
        return type(value) is dict and all(fits(each, kind[str]) for each in value.values())
    if isinstance(kind, dict):
        return type(value) is dict and all(
            name in value and fits(value[name], each) for name, each in kind.items()
        )
    return bool(kind(value))


class _Files(FileSystem):
    """The files that this rank writes."""

    def __init__(self) -> None:
        self._written: dict[str, _DigestingFile] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        path = Path(path)
        path.unlink(missing_ok=True)  # of a killed save; of a link not what it leads to
        with _DigestingFile(io.FileIO(path, "x")) as stream:
            self._written[path.name] = stream
            try:
                yield stream
            except RuntimeError as error:  # of torch.save, whose cleaning up hides why it failed
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def described(self) -> list[tuple[str, dict[str, Any]]]:
        """The names of the files as they are in the end, with sizes and digests."""
        return [
            (name.removesuffix(".tmp"), {"size": stream.size, "sha256": stream.digest.hexdigest()})
            for name, stream in self._written.items()
        ]

    def remove(self, folder: Path) -> None:
        """Delete what was written, and the folder if nothing else is there, as far as possible."""
        for name in self._written:
            for path in (folder / name, folder / name.removesuffix(".tmp")):
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


class _DigestingFile(io.BufferedWriter):
    """A file that is written from its beginning to its end."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return super().write(data)


def _document(metadata: dcp.Metadata, files: Mapping[str, Any]) -> dict[str, Any]:
    """What metadata.json holds."""
    tensors = {}
    for key, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, dcp.TensorStorageMetadata)
        chunks: list[dict[str, Any]] = []
        for chunk in tensor.chunks:
            if math.prod(chunk.sizes):
                info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]  # not public
                part = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                part |= {"file": info.relative_path, "offset": info.offset}
                chunks.append(part | {"length": info.length})
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[key] = {"shape": list(tensor.size), "dtype": dtype, "chunks": chunks}
    document = {"format": _FORMAT, "version": _VERSION, "files": files, "tensors": tensors}
    return document | {"sha256": _digest(document)}


def _write_at_once(files: _Files, path: Path, text: str) -> None:
    """Write a file that others see whole or not at all, and that a crash does not take back."""
    temporary = path.with_name(path.name + ".tmp")
    with files.create_stream(temporary, "wb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except BaseException:
        path.unlink()  # before another rank, which hears of this, removes what it describes
        raise
    finally:
        os.close(folder)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _dims(value: Any) -> bool:
    return fits(value, [_count]) and len(value) <= 64


_CHUNK = {"offsets": _dims, "sizes": _dims, "file": str, "offset": _count, "length": _count}
_TENSOR = {"shape": _dims, "dtype": tuple(_DTYPES).__contains__, "chunks": [_CHUNK]}
_DOCUMENT = {"files": {str: {"size": _count, "sha256": str}}, "tensors": {str: _TENSOR}}


def _parsed(path: Path) -> dict[str, Any]:
    """A metadata.json, of the kinds that it should hold."""
    _check_file(path.parent, path.name)
    if path.stat().st_size > _MAX_METADATA_BYTES:
        raise refusal(path, f"have at most {_MAX_METADATA_BYTES} bytes", f"{path.stat().st_size}")
    try:
        document = json.loads(path.read_bytes())
        version = document["format"], document["version"]
        digest = document.pop("sha256", None)
        received = _digest(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal(path, "be JSON with a format and a version", f"{error!r:.80}") from error
    if version == (_FORMAT, 1):
        raise ValueError(
            f"{path} should be of version {_VERSION} of its format; received version 1, an older "
            "one without digests, which is not read any more; begin anew, or load it with the "
            "version of the package that wrote it"
        )
    if version != (_FORMAT, _VERSION):
        raise refusal(path, f"be of the format {_FORMAT}, version {_VERSION}", f"{version!r:.80}")
    if received != digest:
        raise refusal(path, f"have the SHA-256 that it says, {digest!r:.80}", received)
    if not fits(document, _DOCUMENT):
        raise refusal(path, "describe files and tensors", "values of other kinds")
    return cast(dict[str, Any], document)


class _Place(NamedTuple):
    """Where a chunk is, and what it should be."""

    path: Path
    offset: int
    length: int
    sizes: torch.Size
    dtype: torch.dtype


def _tensor(
    what: str, record: Mapping[str, Any], paths: Mapping[str, Path]
) -> tuple[dcp.TensorStorageMetadata, list[_Place]]:
    shape, dtype = torch.Size(record["shape"]), _DTYPES[record["dtype"]]
    chunks: list[dcp.ChunkStorageMetadata] = []
    places: list[_Place] = []
    for chunk in record["chunks"]:
        file, offsets, sizes = (
            chunk["file"],
            torch.Size(chunk["offsets"]),
            torch.Size(chunk["sizes"]),
        )
        if file not in paths:
            raise refusal(what, "be in the files that are described", repr(file))
        if math.prod(sizes) * dtype.itemsize > chunk["length"]:
            raise refusal(what, f"have bytes for chunks of {list(sizes)}", f"{chunk['length']}")
        chunks.append(dcp.ChunkStorageMetadata(offsets, sizes))
        places.append(_Place(paths[file], chunk["offset"], chunk["length"], sizes, dtype))
    if not _covered_once(shape, chunks):
        received = f"{[(*chunk.offsets, *chunk.sizes) for chunk in chunks]!r:.80}"
        raise refusal(what, f"have chunks that cover {list(shape)} once", received)
    return dcp.TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks), places


def _covered_once(shape: Sequence[int], chunks: Sequence[dcp.ChunkStorageMetadata]) -> bool:
    """Whether the chunks are disjoint, not empty, and cover the shape, in linear time.

    Each dimension's positions get random weights F, and a box the product of the differences
    F(end) - F(start). That is a measure, so a cover adds up to the whole. For other boxes the
    difference is a polynomial of F that is not 0, and is 0 at random F modulo a prime p with a
    probability of at most dims / p (Schwartz and Zippel). ``random`` could be guessed, and would
    move the state that training depends on.
    """
    weights = defaultdict[tuple[int, int], int](lambda: secrets.randbelow(_PRIME))

    def measure(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        bounds = enumerate(zip(offsets, sizes, strict=True))
        return math.prod(weights[d, start + n] - weights[d, start] for d, (start, n) in bounds)

    if not all(len(c.offsets) == len(c.sizes) == len(shape) and all(c.sizes) for c in chunks):
        return False
    covered = sum(measure(chunk.offsets, chunk.sizes) for chunk in chunks)
    return (covered - measure([0] * len(shape), shape)) % _PRIME == 0


def _check_places(path: Path, files: Mapping[str, Any], places: Iterator[_Place]) -> None:
    """Check that the chunks lie within files, and none in another's bytes."""
    ordered = sorted(places, key=lambda place: (place.path, place.offset))
    for place, following in itertools.zip_longest(ordered, ordered[1:]):
        same_file = following is not None and following.path == place.path
        end = following.offset if same_file else files[place.path.name]["size"]
        if place.offset + place.length > end:
            raise refusal(
                path,
                f"have {place.length} bytes of {place.path.name} from byte {place.offset} on",
                f"{end - place.offset}",
            )


def _read_chunk(place: _Place) -> Tensor:
    try:
        with place.path.open("rb") as stream:
            view: Any = _create_file_view(cast(Any, stream), place.offset, place.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        problem = f"what torch.load with weights_only=True refuses ({type(error).__name__})"
        raise refusal(place.path, f"hold a tensor at byte {place.offset}", problem) from error
    wanted = f"a tensor {place.dtype} {list(place.sizes)}"
    received = _described(tensor) if type(tensor) is Tensor else f"a {type(tensor).__name__}"
    if received != wanted:
        raise refusal(place.path, f"hold {wanted} at byte {place.offset}", received)
    return cast(Tensor, tensor)


def _check_agreement(state: Mapping[str, Any], metadata: dcp.Metadata) -> None:
    _check_tensors(state)
    saved = metadata.state_dict_metadata
    for key, tensor in state.items():
        found = _described(saved[key]) if key in saved else "none of this key"
        wanted = _described(tensor)
        if found != wanted:
            raise ValueError(
                f"the checkpoint's {key!r} should be {wanted}; received {found}; load it into "
                "the model that it was saved from"
            )


def _described(tensor: Any) -> str:
    """A tensor, or what the checkpoint says of one, by what must agree."""
    if isinstance(tensor, dcp.TensorStorageMetadata):
        dtype, shape = tensor.properties.dtype, tensor.size
    elif isinstance(tensor, ShardedTensor):  # which warns where it is asked itself
        dtype, shape = tensor.metadata().tensor_properties.dtype, tensor.metadata().size
    else:
        dtype, shape = tensor.dtype, tensor.shape
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


def _check_file(folder: Path, name: str, size: int | None = None) -> Path:
    """The path of a regular file of the folder itself: no link, which could lead out of it."""
    path = folder / name
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise refusal(f"a file of {folder}", "have a plain name", repr(name))
    try:
        status = path.lstat()
    except (OSError, ValueError) as error:  # a name with a NUL
        raise refusal(path, "be a file", "none") from error
    if not stat.S_ISREG(status.st_mode):
        raise refusal(path, "be a regular file", "a link, a folder or another thing")
    if size is not None and status.st_size != size:
        raise refusal(path, f"hold {size} bytes", f"{status.st_size} bytes")
    return path


def _digest_of_file(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def refusal(what: object, should: str, received: str) -> ValueError:
    """The error for what is damaged or foreign."""
    return ValueError(
        f"{what} should {should}; received {received}; load a checkpoint as save_checkpoint left it"
    )

"""metadata.json: the tensors of a checkpoint, their places, and digests of all its files.

``torch.distributed.checkpoint`` (DCP) describes its files in a pickle, ``.metadata``, and to read a
pickle is to run the code in it. So ``metadata.json`` holds the same for us::

    {"format": "torchrec_exfm.checkpoint", "version": 2,
     "files": {"__0_0.distcp": {"size": 1308, "sha256": "5d41..."}, ".metadata": {...}},
     "tensors": {"over.weight": {"shape": [8, 4], "dtype": "float32", "chunks": [
         {"offsets": [0, 0], "sizes": [8, 4], "file": "__0_0.distcp", "offset": 0, "length": 1308}
     ]}},
     "sha256": "9b74..."}

A chunk begins at ``offsets`` in the tensor and at byte ``offset`` in the file. The chunks of a
tensor are disjoint and cover it; an empty tensor has none. The last digest is of ``json.dumps`` of
everything else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

METADATA = "metadata.json"
_FORMAT = "torchrec_exfm.checkpoint"
_VERSION = 2
_MAX_METADATA_BYTES = 2**28  # some 2 million chunks
_PRIME = 2**61 - 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def describe_checkpoint(metadata: dcp.Metadata, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of metadata.json for what DCP saved."""
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


def read_metadata(folder: Path, share: slice = slice(None)) -> dcp.Metadata:
    """Return a checkpoint's tensors, and by key the places of their chunks (``storage_data``).

    The sizes of all its files are checked, and the digests of a ``share`` of them.
    """
    path = folder / METADATA
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} should hold {METADATA}, which save_checkpoint writes last; received none; "
            "load another checkpoint, since this is none or its save did not end"
        )
    document = _parse(path)
    paths = {
        name: _check_file(folder, name, record["size"])
        for name, record in document["files"].items()
    }
    metadata = dcp.Metadata({}, storage_data={})
    for key, record in document["tensors"].items():
        tensor, places = _locate_tensor(f"{path}: {key!r}", record, paths)
        metadata.state_dict_metadata[key] = tensor
        metadata.storage_data[key] = places
    _check_places(path, document["files"], itertools.chain(*metadata.storage_data.values()))
    for name in list(paths)[share]:
        expected, received = document["files"][name]["sha256"], _digest_of_file(paths[name])
        if received != expected:
            raise refusal(paths[name], f"have the SHA-256 {expected}", received)
    return metadata


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: Any) -> bool:
    return fits(value, [_is_count]) and len(value) <= 64


_CHUNK = {
    "offsets": _is_shape,
    "sizes": _is_shape,
    "file": str,
    "offset": _is_count,
    "length": _is_count,
}
_TENSOR = {"shape": _is_shape, "dtype": tuple(_DTYPES).__contains__, "chunks": [_CHUNK]}
_DOCUMENT = {"files": {str: {"size": _is_count, "sha256": str}}, "tensors": {str: _TENSOR}}


def _parse(path: Path) -> dict[str, Any]:
    """Parse a metadata.json; raise a ValueError for one that save_checkpoint would not write."""
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


class Place(NamedTuple):
    """A chunk's place in a file, and its expected shape and dtype."""

    path: Path
    offset: int
    length: int
    sizes: torch.Size
    dtype: torch.dtype


def _locate_tensor(
    what: str, record: Mapping[str, Any], paths: Mapping[str, Path]
) -> tuple[dcp.TensorStorageMetadata, list[Place]]:
    shape, dtype = torch.Size(record["shape"]), _DTYPES[record["dtype"]]
    chunks: list[dcp.ChunkStorageMetadata] = []
    places: list[Place] = []
    for chunk in record["chunks"]:
        file, sizes = chunk["file"], torch.Size(chunk["sizes"])
        if file not in paths:
            raise refusal(what, "be in the files that are described", repr(file))
        if math.prod(sizes) * dtype.itemsize > chunk["length"]:
            raise refusal(what, f"have bytes for chunks of {list(sizes)}", f"{chunk['length']}")
        chunks.append(dcp.ChunkStorageMetadata(torch.Size(chunk["offsets"]), sizes))
        places.append(Place(paths[file], chunk["offset"], chunk["length"], sizes, dtype))
    if not _covered_once(shape, chunks):
        received = f"{[(*chunk.offsets, *chunk.sizes) for chunk in chunks]!r:.80}"
        raise refusal(what, f"have chunks that cover {list(shape)} once", received)
    return dcp.TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks), places


def _covered_once(shape: Sequence[int], chunks: Sequence[dcp.ChunkStorageMetadata]) -> bool:
    """Return whether the chunks are disjoint, not empty, and cover the shape, in linear time.

    Each dimension's positions get random weights F, and a box the product of the differences
    F(end) - F(start). That is a measure, so an exact cover adds up to the measure of the shape. For
    other boxes the difference is a nonzero polynomial of F. At random F modulo a prime p it is 0
    with a probability of at most dims / p (Schwartz and Zippel).
    """
    # Not the module random: whoever forges a file could guess it, and its state is training's.
    weights = defaultdict[tuple[int, int], int](lambda: secrets.randbelow(_PRIME))

    def measure(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        bounds = enumerate(zip(offsets, sizes, strict=True))
        return math.prod(weights[d, start + n] - weights[d, start] for d, (start, n) in bounds)

    if not all(len(c.offsets) == len(c.sizes) == len(shape) and all(c.sizes) for c in chunks):
        return False
    covered = sum(measure(chunk.offsets, chunk.sizes) for chunk in chunks)
    return (covered - measure([0] * len(shape), shape)) % _PRIME == 0


def _check_places(path: Path, files: Mapping[str, Any], places: Iterator[Place]) -> None:
    """Raise a ValueError unless each chunk lies within its file, and no two overlap."""
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


def _check_file(folder: Path, name: str, size: int | None = None) -> Path:
    """Return the path of a regular file right in the folder; a link could lead out of it."""
    path = folder / name
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise refusal(f"a file of {folder}", "have a plain name", repr(name))
    try:
        status = path.lstat()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
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


def fits(value: Any, kind: Any) -> bool:
    """Return whether parsed JSON is of a kind.

    A kind is a type, a predicate, a tuple of alternatives, ``[kind of the items]``,
    ``{str: kind of the values}`` or ``{name: kind of this field}``; further fields are allowed.
    """
    if isinstance(kind, type):
        return type(value) is kind  # not isinstance: True would be an int
    if isinstance(kind, tuple):
        return any(fits(value, alternative) for alternative in kind)
    if isinstance(kind, list):
        return type(value) is list and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict) and str in kind:
        return type(value) is dict and all(fits(item, kind[str]) for item in value.values())
    if isinstance(kind, dict):
        return type(value) is dict and all(
            name in value and fits(value[name], field) for name, field in kind.items()
        )
    return bool(kind(value))


def refusal(what: object, should: str, received: str) -> ValueError:
    """Return the error for a damaged or foreign checkpoint."""
    return ValueError(
        f"{what} should {should}; received {received}; load a checkpoint as save_checkpoint left it"
    )

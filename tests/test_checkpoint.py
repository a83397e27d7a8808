"""Checkpoints: tensors come back unchanged, damage is an error, and nothing is unpickled.

Where a change should be found without the digests, it is sealed: the digests are recomputed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from torchrec_exfm import _manifest, checkpoint
from torchrec_exfm._manifest import fits
from torchrec_exfm.checkpoint import load_checkpoint, read_metadata, save_checkpoint

DATA = "__0_0.distcp"


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "float": torch.randn(3, 4, generator=generator),
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
        "bfloat16": torch.randn(2, 3, generator=generator).bfloat16(),
        "int": torch.tensor([-(2**63), 2**63 - 1, 2**53 + 1]),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "view": torch.randn(4, 6, generator=generator).t()[1::2],
    }


def zeros(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in like.items()}


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().flatten().view(torch.uint8).tolist()
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a checkpoint of two tensors."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, pair())
    return folder


def pair() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor([7, 8, 9])}


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail every test in which anything but torch's unpickler of weights unpickles."""
    calls: list[str] = []
    real = torch.load

    def load(*args: Any, **options: Any) -> Any:
        if options.get("weights_only") is not True:
            calls.append(f"torch.load with {options}")
        return real(*args, **options)

    class Unpickler(pickle.Unpickler):
        def __init__(self, *args: Any, **options: Any) -> None:
            calls.append("pickle.Unpickler")
            super().__init__(*args, **options)

    monkeypatch.setattr(pickle, "Unpickler", Unpickler)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, _recorded(getattr(pickle, name), name, calls))
    monkeypatch.setattr(torch, "load", load)
    yield calls
    assert not calls


def _recorded(real: Callable[..., Any], name: str, calls: list[str]) -> Any:
    def unpickle(*args: Any, **options: Any) -> Any:
        calls.append(f"pickle.{name}")
        return real(*args, **options)

    return unpickle


def refused(folder: Path, kind: type[Exception] = ValueError, **state: Tensor) -> str:
    """Return the error's sentence, and require an unchanged state."""
    into = state or zeros(pair())
    before = {key: bits(value) for key, value in into.items()}
    with pytest.raises(kind) as caught:
        load_checkpoint(folder, into)
    assert {key: bits(value) for key, value in into.items()} == before
    message = str(caught.value)
    assert "\n" not in message
    assert " should " in message
    assert "; received " in message
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change metadata.json, and recompute its digests."""
    path = folder / "metadata.json"
    document = json.loads(path.read_text())
    for name, record in document["files"].items():
        data = (folder / name).read_bytes()
        record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(document)
    document.pop("sha256")
    sealed = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    path.write_text(json.dumps(document | {"sha256": sealed}))


def chunk_of(document: dict[str, Any], key: str = "a") -> dict[str, Any]:
    chunk: dict[str, Any] = document["tensors"][key]["chunks"][0]
    return chunk


def test_round_trip(tmp_path: Path) -> None:
    saved, loaded = state(), zeros(state())
    memory = {key: value.data_ptr() for key, value in loaded.items()}
    save_checkpoint(tmp_path / "new" / "folder", saved)
    load_checkpoint(tmp_path / "new" / "folder", loaded)
    for key, value in saved.items():
        assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape), key
        assert bits(loaded[key]) == bits(value), key
    assert {key: value.data_ptr() for key, value in loaded.items()} == memory


def test_a_model_is_loaded_in_place(tmp_path: Path) -> None:
    saved, loaded = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    save_checkpoint(tmp_path, saved.state_dict())
    load_checkpoint(tmp_path, loaded.state_dict())
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)

    parameters = {key: torch.zeros_like(value) for key, value in saved.named_parameters()}
    load_checkpoint(tmp_path, {key: value.requires_grad_() for key, value in parameters.items()})
    torch.testing.assert_close(parameters, dict(saved.named_parameters()), rtol=0, atol=0)
    assert all(value.is_leaf for value in parameters.values())


def test_a_part_of_a_checkpoint(folder: Path) -> None:
    part = {"b": torch.zeros(3, dtype=torch.int64)}
    load_checkpoint(folder, part)
    assert part["b"].tolist() == [7, 8, 9]


def test_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", DATA, "metadata.json"]
    document = json.loads((folder / "metadata.json").read_text())
    tensor = document["tensors"]["a"]
    (chunk,) = tensor.pop("chunks")
    length = chunk.pop("length")
    assert tensor == {"shape": [3, 2], "dtype": "float32"}
    assert chunk == {"offsets": [0, 0], "sizes": [3, 2], "file": DATA, "offset": 0}
    assert 0 < length < (folder / DATA).stat().st_size
    for name in (DATA, ".metadata"):
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert document["files"].pop(name) == {"size": len(data), "sha256": digest}
    assert not document["files"]


def test_another_tool_reads_it(tmp_path: Path) -> None:
    """DCP reads it in a process without this package."""
    saved = state()
    save_checkpoint(tmp_path / "checkpoint", saved)
    torch.save(saved, tmp_path / "saved")
    program = """
import sys, torch, torch.distributed.checkpoint as dcp
saved = torch.load("saved")
loaded = {key: torch.zeros_like(value) for key, value in saved.items()}
dcp.load(loaded, checkpoint_id="checkpoint", no_dist=True)
for key, value in saved.items():
    torch.testing.assert_close(loaded[key], value, rtol=0, atol=0, equal_nan=True)
assert "torchrec_exfm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("value", [3, "text", None, {"inner": torch.ones(1)}, nn.Linear(1, 1)])
def test_only_tensors(folder: Path, tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"'step', of type .*; leave out"):
        save_checkpoint(tmp_path / "other", {"a": torch.ones(2), "step": value})
    assert not (tmp_path / "other" / "metadata.json").exists()
    with pytest.raises(TypeError, match=r"'step', of type .*; leave out"):
        load_checkpoint(folder, {**pair(), "step": value})


@pytest.mark.parametrize("name", ["metadata.json", ".metadata"])
def test_a_checkpoint_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=f"{name}; save to a new folder"):
        save_checkpoint(tmp_path, pair())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_save_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "new", {"a": torch.ones(3, 2), "b": torch.ones(3)})
    assert not (tmp_path / "new").exists()
    assert "did not end" in refused(tmp_path / "new", FileNotFoundError)

    save_checkpoint(tmp_path / "new", pair())
    loaded = zeros(pair())
    load_checkpoint(tmp_path / "new", loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)


def test_a_save_that_was_killed(tmp_path: Path) -> None:
    """Files without metadata.json are saved over; a link among them is replaced, not followed."""
    save_checkpoint(tmp_path / "new", {"a": torch.ones(3, 2), "b": torch.ones(3)})
    for name in ("metadata.json", ".metadata"):
        (tmp_path / "new" / name).unlink()
    assert "did not end" in refused(tmp_path / "new", FileNotFoundError)
    (tmp_path / "new" / DATA).rename(tmp_path / "outside")
    before = (tmp_path / "outside").read_bytes()
    (tmp_path / "new" / DATA).symlink_to(tmp_path / "outside")

    save_checkpoint(tmp_path / "new", pair())
    loaded = zeros(pair())
    load_checkpoint(tmp_path / "new", loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)
    assert (tmp_path / "outside").read_bytes() == before


def test_a_full_disk_is_freed(tmp_path: Path) -> None:
    """A failed save frees its space (simulated by a file-size limit); other files stay."""
    (tmp_path / "notes.txt").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, {"a": torch.ones(10), "b": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_metadata_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When metadata.json gets its name, it and all other files are on the disk."""
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def looked(source: Any, target: Any) -> None:
        assert synced == [DATA, ".metadata.tmp", Path(source).name]
        assert json.loads(Path(source).read_text())["tensors"].keys() == pair().keys()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", looked)
    save_checkpoint(tmp_path, pair())
    assert synced[3:] == [tmp_path.name]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".metadata", DATA, "metadata.json"]


def test_states_that_do_not_fit(folder: Path) -> None:
    a, b = zeros(pair()).values()
    assert "'c' should be a tensor torch.float32 [2]; received none" in refused(
        folder, a=a, c=torch.zeros(2)
    )
    assert (
        "'a' should be a tensor torch.float32 [2, 3]; received a tensor torch.float32 [3, 2]"
        in (refused(folder, b=b, a=torch.zeros(2, 3)))
    )
    assert "'b' should be a tensor torch.int32 [3]; received a tensor torch.int64 [3]" in refused(
        folder, a=a, b=b.int()
    )


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        message = refused(folder, FileNotFoundError)
        assert str(folder) in message
        assert "metadata.json" in message


@pytest.mark.parametrize("text", ["", "{", '{"format": 1', "\udc80", "[" * 100_000, "7", "null"])
def test_metadata_that_is_no_metadata(folder: Path, text: str) -> None:
    (folder / "metadata.json").write_text(text, errors="surrogateescape")
    assert "metadata.json should " in refused(folder)


def test_metadata_cut_anywhere(folder: Path) -> None:
    content = (folder / "metadata.json").read_bytes()
    for size in range(0, len(content), 7):
        (folder / "metadata.json").write_bytes(content[:size])
        assert "metadata.json should be JSON" in refused(folder)


HUGE = 2**63
KINDS = "describe files and tensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "version 2; received ('other', 2)"),
        (lambda d: d.update(version=3), "version 2; received ('torchrec_exfm.checkpoint', 3)"),
        (lambda d: d.update(version=[]), "version 2; received ('torchrec_exfm.checkpoint', [])"),
        (lambda d: d.pop("version"), "a format and a version; received KeyError('version')"),
        (lambda d: d.update(version=1), "an older one without digests, which is not read any more"),
        (lambda d: d.update(tensors=[]), KINDS),
        (lambda d: d.pop("files"), KINDS),
        (lambda d: d["files"].update({DATA: None}), KINDS),
        (lambda d: d["files"][DATA].update(size="7"), KINDS),
        (lambda d: d["files"][DATA].update(size=7), f"{DATA} should hold 7 bytes; received"),
        (lambda d: d["files"][DATA].update(sha256="7"), f"{DATA} should have the SHA-256 7;"),
        (lambda d: d["files"].pop(DATA), "'a' should be in the files that are described"),
        (lambda d: d["tensors"].pop("a"), "'a' should be a tensor torch.float32 [3, 2]; received"),
        (lambda d: d["tensors"].update(a=None), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[3, 2.0]), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[3, True]), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[-3, -2]), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[HUGE, 2]), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[1] * 65), KINDS),
        (lambda d: d["tensors"]["a"].update(shape=[3, 3]), "chunks that cover [3, 3] once"),
        (lambda d: d["tensors"]["a"].update(dtype="float33"), KINDS),
        (lambda d: d["tensors"]["a"].update(dtype=[]), KINDS),
        (lambda d: d["tensors"]["a"].update(dtype="int32"), "received a tensor torch.int32"),
        (lambda d: d["tensors"]["a"].update(chunks=[]), "cover [3, 2] once; received []"),
        (lambda d: d["tensors"]["a"].update(chunks=[7]), KINDS),
        (lambda d: chunk_of(d).update(sizes=[2, 2]), "cover [3, 2] once; received [(0, 0, 2, 2)]"),
        (lambda d: chunk_of(d).update(sizes=[3]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(offsets=[1, 0]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(sizes=[0, 2]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(sizes=[2**40, 2]), "bytes for chunks of [1099511627776, 2]"),
        (lambda d: chunk_of(d).update(offset=-1), KINDS),
        (lambda d: chunk_of(d).update(length=0), "bytes for chunks of [3, 2]; received 0"),
        (lambda d: chunk_of(d).update(length=HUGE - 1), f"have {HUGE - 1} bytes of {DATA}"),
        (lambda d: chunk_of(d).update(offset=1), "from byte 1 on; received"),
        (lambda d: chunk_of(d).update(offset=0.0), KINDS),
        (lambda d: chunk_of(d).update(file=None), KINDS),
        (lambda d: chunk_of(d).update(file="__9_0.distcp"), "described; received '__9_0.distcp'"),
    ],
)
def test_metadata_that_is_wrong(folder: Path, change: Callable[..., Any], message: str) -> None:
    edit(folder, change)
    assert message in refused(folder)


def test_kinds() -> None:
    kind = {"a": [int], "b": {str: (str, [float])}, "c": lambda value: value == 7}
    value = {"a": [1], "b": {"x": "y", "z": [0.5]}, "c": 7, "more": None}
    assert fits(value, kind)
    wrongs = ({"a": [True]}, {"a": (1,)}, {"b": []}, {"b": {"x": 1}}, {"c": 8})
    assert not any(fits({**value, **wrong}, kind) for wrong in wrongs)
    assert not fits({"a": [1], "b": {}}, kind)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", [DATA, ".metadata", "metadata.json"])
def test_flipped_bits(folder: Path, name: str, sealed: bool) -> None:
    """No flipped bit changes a value silently; sealed ones in the data may."""
    saved, content = pair(), (folder / name).read_bytes()
    described = (folder / "metadata.json").read_bytes()
    if sealed and name == "metadata.json":
        pytest.skip("a digest of its own can't be made to fit every change")
    generator, refusals = random.Random(0), 0
    for bit in (generator.randrange(8 * len(content)) for _ in range(200)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        if sealed:
            edit(folder)
        loaded = zeros(saved)
        try:
            load_checkpoint(folder, loaded)
        except (ValueError, FileNotFoundError):
            refusals += 1
            assert not any(value.any() for value in loaded.values()), bit
        else:
            assert sealed or all(loaded[key].equal(saved[key]) for key in saved), bit
        (folder / "metadata.json").write_bytes(described)
    assert (refusals == 200) is not sealed


def test_every_flipped_bit_of_metadata(folder: Path) -> None:
    content, expected = (folder / "metadata.json").read_bytes(), read_metadata(folder)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "metadata.json").write_bytes(flipped)
        with contextlib.suppress(ValueError):
            assert read_metadata(folder) == expected, bit


def chunks_of(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]


def test_covers_as_cells_count_them() -> None:
    """Random boxes are compared with a count of each cell."""
    generator, covers = random.Random(0), 0
    for _ in range(2000):
        shape = [generator.randint(1, 3) for _ in range(generator.randint(1, 3))]
        boxes = []
        for _ in range(generator.randint(1, 3)):
            at = [generator.randrange(size + 1) for size in shape]
            boxes.append((at, [generator.randint(0, 3) for _ in shape]))
        if generator.random() < 0.5:  # a cover, by a cut
            cut = generator.randint(0, shape[0])
            rest = [0] * (len(shape) - 1), shape[1:]
            boxes = [([0, *rest[0]], [cut, *rest[1]])]
            boxes.append(([cut, *rest[0]], [shape[0] - cut, *rest[1]]))
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for at, sizes in boxes:
            ranges = (range(a, a + size) for a, size in zip(at, sizes, strict=True))
            for cell in itertools.product(*ranges):
                counts[cell] = counts.get(cell, 0) + 1
        outside = len(counts) > math.prod(shape)
        expected = set(counts.values()) == {1} and not outside
        expected &= all(all(sizes) for _, sizes in boxes)
        covers += expected
        assert _manifest._covered_once(shape, chunks_of(boxes)) is expected, (shape, boxes)
    assert covers > 300


@pytest.mark.parametrize("across", [False, True])
def test_many_chunks_are_checked_in_linear_time(folder: Path, across: bool) -> None:
    """20,000 of one element; before, a quarter of them took minutes."""
    count = 20_000

    def change(document: dict[str, Any]) -> None:
        chunk = chunk_of(document) | {"sizes": [1, 1], "length": 4}
        document["tensors"]["a"] = {
            "shape": [1, count] if across else [count, 1],
            "dtype": "float32",
            "chunks": [
                chunk | {"offsets": [0, i] if across else [i, 0], "offset": 4 * i}
                for i in range(count)
            ],
        }

    edit(folder, change)
    started = time.monotonic()
    assert f"have 4 bytes of {DATA}" in refused(folder)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deep_json(folder: Path, depth: int) -> None:
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "7" + "}" * depth):
        (folder / "metadata.json").write_text(f'{{"format": 1, "version": 2, "files": {value}}}')
        assert "metadata.json should " in refused(folder)


def test_chunks_that_overlap(tmp_path: Path) -> None:
    """The number of elements is right, but some come twice and others never."""
    tensor = torch.zeros(4, 2)
    save_checkpoint(tmp_path, {"a": tensor, "one": tensor[:2], "two": tensor[2:]})

    def change(document: dict[str, Any], first: int, second: int) -> None:
        halves = chunk_of(document, "one"), chunk_of(document, "two")
        starts = ([first, 0], [second, 0])
        document["tensors"] = {"a": document["tensors"]["a"]}
        document["tensors"]["a"]["chunks"] = [
            half | {"offsets": start} for half, start in zip(halves, starts, strict=True)
        ]

    described = (tmp_path / "metadata.json").read_bytes()
    edit(tmp_path, lambda document: change(document, 2, 0))
    load_checkpoint(tmp_path, {"a": torch.ones(4, 2)})
    (tmp_path / "metadata.json").write_bytes(described)
    edit(tmp_path, lambda document: change(document, 1, 0))
    assert "cover [4, 2] once" in refused(tmp_path, a=torch.ones(4, 2))
    (tmp_path / "metadata.json").write_bytes(described)
    edit(tmp_path, lambda d: chunk_of(d, "two").update(offset=chunk_of(d, "one")["offset"]))
    assert "bytes of __0_0.distcp from byte" in refused(tmp_path, a=torch.ones(4, 2))


@pytest.mark.parametrize("absolute", [False, True])
def test_names_that_lead_out_of_the_folder(folder: Path, absolute: bool) -> None:
    """The named file is the checkpoint's own or a copy, so only its name can be refused."""
    outside = folder.parent / "outside"
    shutil.copy(folder / DATA, outside)
    (folder / "inner").mkdir()
    shutil.copy(folder / DATA, folder / "inner" / DATA)
    names = [str(outside)] if absolute else ["../outside", f"inner/{DATA}", f"./{DATA}", "..", ""]
    described = (folder / "metadata.json").read_bytes()
    for name in names:

        def change(document: dict[str, Any], name: str = name) -> None:
            document["files"][name] = document["files"].pop(DATA)
            for key in pair():
                chunk_of(document, key).update(file=name)

        edit(folder, change)
        assert f"plain name; received {name!r}" in refused(folder)
        (folder / "metadata.json").write_bytes(described)


@pytest.mark.parametrize("name", [DATA, ".metadata", "metadata.json"])
@pytest.mark.parametrize("where", ["outside", "inside", "itself"])
def test_links(folder: Path, name: str, where: str) -> None:
    target = folder.parent / "outside" if where == "outside" else folder / where
    (folder / name).rename(target)
    (folder / name).symlink_to(name if where == "itself" else target)
    if (name, where) == ("metadata.json", "itself"):
        assert name in refused(folder, FileNotFoundError)
    else:
        assert f"{name} should be a regular file; received a link" in refused(folder)


def test_a_link_to_the_folder(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    loaded = zeros(pair())
    load_checkpoint(folder.parent / "link", loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)


@pytest.mark.parametrize("lost", [1, 100, 3000])
def test_data_that_is_cut(folder: Path, lost: int) -> None:
    os.truncate(folder / DATA, (folder / DATA).stat().st_size - lost)
    message = refused(folder)
    assert str(folder / DATA) in message
    assert f"received {(folder / DATA).stat().st_size} bytes" in message


def test_data_that_is_missing(folder: Path) -> None:
    (folder / DATA).unlink()
    assert f"{folder / DATA} should be a file; received none" in refused(folder)
    (folder / DATA).mkdir()
    assert f"{folder / DATA} should be a regular file; received a link, a folder" in refused(folder)
    (folder / DATA).rmdir()
    os.mkfifo(folder / DATA)  # which would not end to be read
    assert f"{folder / DATA} should be a regular file; received a link, a folder" in refused(folder)


def put(folder: Path, write: Callable[[Any], None]) -> None:
    """Let a function write the data of "a", and recompute the digests."""
    with (folder / DATA).open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        offset = stream.tell()
        write(stream)
        length = stream.tell() - offset
    edit(folder, lambda document: chunk_of(document).update(offset=offset, length=length))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(3, 2, dtype=torch.float64), "received a tensor torch.float64 [3, 2]"),
        (torch.ones(3, 1), "received a tensor torch.float32 [3, 1]"),
        (nn.Parameter(torch.ones(3, 2)), "received a Parameter"),
        ({"a": torch.ones(3, 2)}, "received a dict"),
        ([7], "received a list"),
    ],
)
def test_data_of_something_else(folder: Path, value: Any, expected: str) -> None:
    put(folder, lambda stream: torch.save(value, stream))
    message = refused(folder)
    assert f"{folder / DATA} should hold a tensor torch.float32 [3, 2]" in message
    assert expected in message


def test_data_that_is_as_good(folder: Path) -> None:
    """Valid data written the same way load: the test above refuses content, not the method."""
    put(folder, lambda stream: torch.save(torch.full((3, 2), 5.0), stream))
    loaded = zeros(pair())
    load_checkpoint(folder, loaded)
    assert loaded["a"].tolist() == [[5.0, 5.0]] * 3


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def bombs(flag: Path) -> dict[str, Callable[[Any], None]]:
    return {
        "pickle": lambda stream: pickle.dump(Bomb(flag), stream),
        "torch.save": lambda stream: torch.save(Bomb(flag), stream),
        "within": lambda stream: torch.save({"a": torch.ones(3, 2), "b": Bomb(flag)}, stream),
        "legacy": lambda stream: torch.save(
            Bomb(flag), stream, _use_new_zipfile_serialization=False
        ),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # which torch.load goes on from
@pytest.mark.parametrize("kind", bombs(Path()))
def test_malicious_data(folder: Path, tmp_path: Path, unpickled: list[str], kind: str) -> None:
    flag = tmp_path / "flag"
    put(folder, bombs(flag)[kind])
    assert f"{folder / DATA} should hold a tensor" in refused(folder)
    assert not flag.exists()
    assert not unpickled

    with (tmp_path / "bomb").open("wb") as stream:
        bombs(flag)[kind](stream)
    with contextlib.suppress(RuntimeError):
        torch.load(tmp_path / "bomb", weights_only=False)
    assert flag.exists()
    unpickled.clear()


@pytest.mark.parametrize("with_metadata", [True, False])
def test_malicious_metadata_of_dcp(
    folder: Path, tmp_path: Path, unpickled: list[str], with_metadata: bool
) -> None:
    """No pickle of DCP is read, with or without metadata.json."""
    flag = tmp_path / "flag"
    for name in (".metadata", "__0.metadata"):
        (folder / name).write_bytes(pickle.dumps(Bomb(flag)))
    assert ".metadata should hold " in refused(folder)
    if with_metadata:
        edit(folder)
        loaded = zeros(pair())
        load_checkpoint(folder, loaded)
        torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)
    else:
        (folder / "metadata.json").unlink()
        refused(folder, FileNotFoundError)
    assert not flag.exists()
    assert not unpickled

    pickle.loads((folder / ".metadata").read_bytes())
    assert flag.exists()
    unpickled.clear()


@pytest.mark.parametrize("kept_bytes", [0, 30, 2**30])
def test_what_is_not_kept_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "_MAX_CACHED_BYTES", kept_bytes)
    loaded = zeros(pair())
    load_checkpoint(folder, loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)
    put(folder, lambda stream: torch.save([7], stream))
    assert "received a list" in refused(folder)


def test_memory_maps_as_the_default(folder: Path) -> None:
    """A user's default of memory mapping, which torch.load can't do within a file, is harmless."""
    loaded = zeros(pair())
    with torch.utils.serialization.config.patch({"load.mmap": True}):
        assert torch.utils.serialization.config.load.mmap
        load_checkpoint(folder, loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)


def test_environment_that_would_unpickle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is for calls that do not say weights_only."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    put(folder, bombs(tmp_path / "flag")["torch.save"])
    refused(folder)
    assert not (tmp_path / "flag").exists()

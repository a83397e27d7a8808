"""Checkpoints: what goes in comes out, what is wrong is told, and nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchrec_exfm.checkpoint import load_checkpoint, save_checkpoint

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
    found: list[int] = tensor.contiguous().flatten().view(torch.uint8).tolist()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two tensors."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, pair())
    return folder


def pair() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor([7, 8, 9])}


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fails each test in which anything but torch's unpickler of weights unpickles."""
    found: list[str] = []
    real = torch.load

    def load(*args: Any, **options: Any) -> Any:
        if options.get("weights_only") is not True:
            found.append(f"torch.load with {options}")
        return real(*args, **options)

    class Unpickler(pickle.Unpickler):
        def __init__(self, *args: Any, **options: Any) -> None:
            found.append("pickle.Unpickler")
            super().__init__(*args, **options)

    monkeypatch.setattr(pickle, "Unpickler", Unpickler)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, _told(getattr(pickle, name), name, found))
    monkeypatch.setattr(torch, "load", load)
    yield found
    assert not found


def _told(real: Callable[..., Any], name: str, found: list[str]) -> Any:
    def unpickle(*args: Any, **options: Any) -> Any:
        found.append(f"pickle.{name}")
        return real(*args, **options)

    return unpickle


def refused(folder: Path, kind: type[Exception] = ValueError, **given: Tensor) -> str:
    """The one sentence of an error, after which the state is as before."""
    into = given or zeros(pair())
    before = {key: bits(value) for key, value in into.items()}
    with pytest.raises(kind) as caught:
        load_checkpoint(folder, into)
    assert {key: bits(value) for key, value in into.items()} == before
    message = str(caught.value)
    assert "\n" not in message
    assert " should " in message
    assert "; received " in message
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change metadata.json."""
    path = folder / "metadata.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


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
    assert sorted(path.name for path in folder.iterdir()) == [DATA, "metadata.json"]
    tensor = json.loads((folder / "metadata.json").read_text())["tensors"]["a"]
    (chunk,) = tensor.pop("chunks")
    length = chunk.pop("length")
    assert tensor == {"shape": [3, 2], "dtype": "float32"}
    assert chunk == {"offsets": [0, 0], "sizes": [3, 2], "file": DATA, "offset": 0}
    assert 0 < length < (folder / DATA).stat().st_size


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
            save_checkpoint(tmp_path, {"a": torch.ones(3, 2), "b": torch.ones(3)})
    assert (tmp_path / DATA).exists()
    assert "did not end" in refused(tmp_path, FileNotFoundError)

    save_checkpoint(tmp_path, pair())
    loaded = zeros(pair())
    load_checkpoint(tmp_path, loaded)
    torch.testing.assert_close(loaded, pair(), rtol=0, atol=0)


def test_metadata_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it gets its name all the rest is on the disk, and it is whole."""
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def told(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def looked(source: Any, target: Any) -> None:
        assert synced == [DATA, Path(source).name]
        assert json.loads(Path(source).read_text())["tensors"].keys() == pair().keys()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "replace", looked)
    save_checkpoint(tmp_path, pair())
    assert synced[2:] == [tmp_path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [DATA, "metadata.json"]


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
    whole = (folder / "metadata.json").read_bytes()
    for size in range(0, len(whole), 7):
        (folder / "metadata.json").write_bytes(whole[:size])
        assert "metadata.json should be JSON" in refused(folder)


HUGE = 2**63


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(format="other"), "version 1; received ('other', 1)"),
        (lambda d: d.update(version=2), "version 1; received ('torchrec_exfm.checkpoint', 2)"),
        (lambda d: d.update(version=True), "'version', of type int; received True"),
        (lambda d: d.pop("version"), "'version', of type int; received None"),
        (lambda d: d.update(tensors=[]), "'tensors', of type dict"),
        (lambda d: d["tensors"].pop("a"), "'a' should be a tensor torch.float32 [3, 2]; received"),
        (lambda d: d["tensors"].update(a=None), "'a' should have 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape=[3, 2.0]), "'a' should have counts as 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape=[3, True]), "'a' should have counts as 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape=[-3, -2]), "'a' should have counts as 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape=[HUGE, 2]), "'a' should have counts as 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape=[3, 3]), "chunks that cover [3, 3] once"),
        (lambda d: d["tensors"]["a"].update(dtype="float"), "'a' should be of a dtype of torch"),
        (lambda d: d["tensors"]["a"].update(dtype="int32"), "received a tensor torch.int32"),
        (lambda d: d["tensors"]["a"].update(chunks=[]), "cover [3, 2] once; received []"),
        (lambda d: d["tensors"]["a"].update(chunks=[7]), "'a' should have 'sizes'"),
        (lambda d: chunk_of(d).update(sizes=[2, 2]), "cover [3, 2] once; received [(0, 0, 2, 2)]"),
        (lambda d: chunk_of(d).update(sizes=[3]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(offsets=[1, 0]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(sizes=[0, 2]), "cover [3, 2] once"),
        (lambda d: chunk_of(d).update(offset=-1), "from byte -1 on"),
        (lambda d: chunk_of(d).update(length=0), "hold 0 bytes"),
        (lambda d: chunk_of(d).update(length=HUGE), f"hold {HUGE} bytes"),
        (lambda d: chunk_of(d).update(offset=0.0), "'offset', of type int; received 0.0"),
        (lambda d: chunk_of(d).update(file=None), "'file', of type str"),
        (lambda d: chunk_of(d).update(file="__9_0.distcp"), "__9_0.distcp should be a file"),
    ],
)
def test_metadata_that_is_wrong(folder: Path, change: Callable[..., Any], told: str) -> None:
    edit(folder, change)
    assert told in refused(folder)


def test_chunks_that_overlap(tmp_path: Path) -> None:
    """As many elements as there should be, of which some come twice and others never."""
    whole = torch.zeros(4, 2)
    save_checkpoint(tmp_path, {"a": whole, "half": whole[:2]})

    def change(document: dict[str, Any], first: int, second: int) -> None:
        half = chunk_of(document, "half")
        starts = ([first, 0], [second, 0])
        document["tensors"]["a"]["chunks"] = [half | {"offsets": start} for start in starts]

    edit(tmp_path, lambda document: change(document, 2, 0))
    load_checkpoint(tmp_path, {"a": torch.ones(4, 2)})
    edit(tmp_path, lambda document: change(document, 1, 0))
    assert "cover [4, 2] once" in refused(tmp_path, a=torch.ones(4, 2))

    def with_an_empty_one(document: dict[str, Any]) -> None:
        chunk = chunk_of(document)
        document["tensors"]["a"]["chunks"] = [chunk | {"sizes": [0, 2]}, chunk]

    shutil.rmtree(tmp_path)
    save_checkpoint(tmp_path, {"a": whole})
    edit(tmp_path, with_an_empty_one)
    assert "cover [4, 2] once" in refused(tmp_path, a=torch.ones(4, 2))


@pytest.mark.parametrize("absolute", [False, True])
def test_names_that_lead_out_of_the_folder(folder: Path, absolute: bool) -> None:
    """Were the file read, it would do: it is the checkpoint's own."""
    outside = folder.parent / "outside"
    shutil.copy(folder / DATA, outside)
    (folder / "inner").mkdir()
    shutil.copy(folder / DATA, folder / "inner" / DATA)
    names = [str(outside)] if absolute else ["../outside", f"inner/{DATA}", f"./{DATA}", "..", ""]
    for name in names:
        edit(folder, lambda document, name=name: chunk_of(document).update(file=name))
        assert f"plain name; received {name!r}" in refused(folder)


@pytest.mark.parametrize("name", [DATA, "metadata.json"])
def test_links(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert f"{name} should be a file in its folder; received a link to {outside}" in refused(folder)

    outside.rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    load_checkpoint(folder, zeros(pair()))

    (folder / name).unlink()
    (folder / name).symlink_to(name)
    kind = FileNotFoundError if name == "metadata.json" else ValueError
    assert name in refused(folder, kind)


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
    assert f"{folder / DATA} should be a file; received none" in refused(folder)


def put(folder: Path, write: Callable[[Any], None]) -> None:
    """Let the data of "a" be what a function writes."""
    with (folder / DATA).open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        offset = stream.tell()
        write(stream)
        length = stream.tell() - offset
    edit(folder, lambda document: chunk_of(document).update(offset=offset, length=length))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(3, 2, dtype=torch.float64), "received a tensor torch.float64 [3, 2]"),
        (torch.ones(3, 1), "received a tensor torch.float32 [3, 1]"),
        (nn.Parameter(torch.ones(3, 2)), "received a Parameter"),
        ({"a": torch.ones(3, 2)}, "received a dict"),
        ([7], "received a list"),
    ],
)
def test_data_of_something_else(folder: Path, value: Any, told: str) -> None:
    put(folder, lambda stream: torch.save(value, stream))
    message = refused(folder)
    assert f"{folder / DATA} should hold a tensor torch.float32 [3, 2]" in message
    assert told in message


def test_data_that_is_as_good(folder: Path) -> None:
    """What the tests above put there is refused for what it is."""
    put(folder, lambda stream: torch.save(torch.full((3, 2), 5.0), stream))
    loaded = zeros(pair())
    load_checkpoint(folder, loaded)
    assert loaded["a"].tolist() == [[5.0, 5.0]] * 3


class Bomb:
    """An object that makes a folder where it is unpickled."""

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


@pytest.mark.parametrize("whole", [True, False])
def test_malicious_metadata_of_dcp(
    folder: Path, tmp_path: Path, unpickled: list[str], whole: bool
) -> None:
    """Neither DCP's pickle nor that of a rank is read, be there a metadata.json or not."""
    flag = tmp_path / "flag"
    for name in (".metadata", "__0.metadata"):
        (folder / name).write_bytes(pickle.dumps(Bomb(flag)))
    if whole:
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


def test_memory_maps_as_the_default(folder: Path) -> None:
    """A setting of torch.load that can't be had within a file."""
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

"""The command shows, verifies and compacts stores; every kind of violation is planted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from torch import nn

from torchrec_exfm.das import Snapshot, TeacherStore, forget, publish, published, verify
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.delta import Table
from torchrec_exfm.das.schema import SNAPSHOTS

DAY = 86_400
START = 20_000 * DAY  # 2024-10-04
FM = f"outputs/teacher=fm/window={START // DAY}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a good store: two teachers, scored and logged outputs, windows of several files."""
    root = tmp_path_factory.mktemp("command") / "store"
    store = TeacherStore.create(root, tasks=("click", "buy"))
    snapshots = [
        publish(store, "fm", nn.Linear(2, 3), trained_through_seconds=START + day * DAY - 1)
        for day in range(2)
    ]
    rng = np.random.default_rng(0)
    for day, snapshot in enumerate(snapshots):
        for shard in range(2):
            ids = 1000 * day + 100 * shard + rng.permutation(100)
            write(store, snapshot, ids, START + day * DAY + 10 * (ids % 1000))
    for snapshot, ids in ((Snapshot("fm", 0, 0), np.arange(30)), (snapshots[0], [30, 31])):
        write(store, snapshot, ids, START + 10 * np.asarray(ids), logged=True)
    write(store, Snapshot("far", 7, START - 60), np.arange(3), START + np.arange(3))
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> TeacherStore:
    """Copy the good store, to be damaged."""
    return TeacherStore(shutil.copytree(made, tmp_path / "store"))


def write(store: TeacherStore, snapshot: Snapshot, ids: Any, seconds: Any, **options: Any) -> None:
    outputs = np.stack([ids, np.negative(ids)], axis=1).astype(np.float32)
    store.write(snapshot, ids, outputs, seconds, **options)


def plant(store: TeacherStore, **columns: Any) -> None:
    """Append a row without any checks."""
    row = {
        "example_id": 999_999,
        "output_click": 0.5,
        "output_buy": 0.5,
        "event_time": (START + 100) * 10**6,
        "snapshot": 1,
        "trained_through": (START - 1) * 10**6,
        "logged": False,
        "scored_at": 2 * 10**15,
        "teacher": "fm",
        "window": START // DAY,
        **columns,
    }
    write_deltalake(
        store.table.url, pa.Table.from_pylist([row], schema=store.format.schema()), mode="append"
    )


def newest_file(store: TeacherStore) -> Path:
    """Return the newest data file of the damaged window."""
    files = (Path(store.url) / FM).glob("*.parquet")
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def rows_of(store: TeacherStore) -> list[tuple[Any, ...]]:
    store.refresh()
    tuples = []
    for teacher in store.teachers():
        for window in store.windows(teacher):
            rows, _ = store.read(teacher, window)
            columns = [rows.example_id, rows.outputs, rows.event_time, rows.snapshot]
            columns += [rows.trained_through, rows.logged, rows.scored_at]
            tuples += [(teacher, *map(str, row)) for row in zip(*columns, strict=True)]
    return sorted(tuples)


def test_a_good_store_verifies(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", store.url]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "note: 3 rows of far are of versions not published here: 7",
        "note: 30 rows of fm are of versions not published here: 0",
        f"{store.url}, commit 7: 7 files, 435 rows, 2 snapshots, 2 checkpoints, 0 violations",
    ]
    assert err == ""


def truncate(store: TeacherStore) -> Path:
    file = newest_file(store)
    os.truncate(file, file.stat().st_size - 10)
    return file


def remove(store: TeacherStore) -> Path:
    file = newest_file(store)
    file.unlink()
    return file


def overwrite(store: TeacherStore) -> Path:
    file = newest_file(store)
    file.write_bytes(b"x" * file.stat().st_size)
    return file


def link(store: TeacherStore) -> Path:
    file = newest_file(store)
    file.rename(Path(store.url).parent / "elsewhere")
    file.symlink_to(Path(store.url).parent / "elsewhere")
    return Path(file.parent.name) / file.name


def miscount(store: TeacherStore) -> Path:
    log = Path(store.url) / "outputs/_delta_log/00000000000000000001.json"
    log.write_text(log.read_text().replace('\\"numRecords\\":100', '\\"numRecords\\":99'))
    return Path(store.url) / FM


def drop_column(store: TeacherStore) -> Path:
    """Replace a file by one without a nullable column, of the size in the log."""
    file = newest_file(store)
    rewrite(file, pq.ParquetFile(file).read().drop_columns("item_id"), Path(store.url) / "outputs")
    return file


def rewrite(file: Path, rows: pa.Table, table: Path, **options: Any) -> None:
    """Rewrite a file with other rows, and correct its size in the log."""
    size = file.stat().st_size
    pq.write_table(rows, file, **options)
    for log in (table / "_delta_log").glob("*.json"):
        if file.name in log.read_text():
            log.write_text(log.read_text().replace(str(size), str(file.stat().st_size)))


def widen(store: TeacherStore) -> Path:
    extra = pa.field("extra", pa.int64())
    data = store.format.schema().append(extra).empty_table()
    write_deltalake(store.table.url, data, mode="append", schema_mode="merge")
    return Path(store.url) / "outputs"


def repartition(store: TeacherStore) -> Path:
    shutil.rmtree(store.table.url)
    description = store.format.to_json()
    Table.create(store.table.url, store.format.schema(), ("window", "teacher"), description)
    return Path(store.table.url)


def planted(**columns: Any) -> Callable[[TeacherStore], Path]:
    def function(store: TeacherStore) -> Path:
        plant(store, **columns)
        return newest_file(store)

    return function


def forget_checkpoint(store: TeacherStore, file: str) -> Path:
    folder = min((Path(store.url) / "checkpoints/fm").iterdir())
    (folder / file).unlink()
    return folder


def cut_checkpoint(store: TeacherStore) -> Path:
    (file,) = min((Path(store.url) / "checkpoints/fm").iterdir()).glob("*.distcp")
    os.truncate(file, 100)
    return file


def lead_away(store: TeacherStore) -> Path:
    row = {"teacher": "fm", "version": 9, "trained_through": 0, "published_at": 0}
    data = pa.Table.from_pylist([{**row, "checkpoint": "../../../etc"}], schema=SNAPSHOTS)
    write_deltalake(f"{store.url}/snapshots", data, mode="append")
    return Path(store.url)


LATER = {"event_time": (START + DAY + 5) * 10**6, "window": START // DAY + 1}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "was cut short or replaced"),
        (remove, "is missing"),
        (overwrite, "can't be read"),
        (link, "is not in the table's folder"),
        (repartition, "is partitioned by ('window', 'teacher'), not by ('teacher', 'window')"),
        (drop_column, "lacks the columns ['item_id']"),
        (widen, "not as in the format: ['pyarrow.Field<extra: int64>']"),
        (planted(snapshot=3, trained_through=(START + 100) * 10**6), "1 of 1 rows leak"),
        (planted(output_buy=float("nan")), "1 of 1 rows have an output that is NaN"),
        (planted(example_id=-4), "rows have a negative example id: rows 0 (example ids -4)"),
        (planted(event_time=(START - 5) * 10**6, snapshot=3, trained_through=0), "lie outside"),
        (planted(example_id=10), "1 of 1 rows repeat an output of their snapshot: rows 0"),
        (
            planted(example_id=10, snapshot=3, event_time=(START + 101) * 10**6),
            "have another event time than another row of their example: rows 0 (example ids 10)",
        ),
        (
            planted(trained_through=(START - 2) * 10**6),
            "1 of 1 rows contradict that version 1 was trained through 2024-10-03T23:59:59Z",
        ),
        (lambda s: forget_checkpoint(s, "metadata.json"), "should hold metadata.json"),
        (lambda s: forget_checkpoint(s, "__0_0.distcp"), "should be a file; received none"),
        (cut_checkpoint, "bytes; received"),
        (lead_away, "is refused: it may leave"),
    ],
)
def test_a_violation_is_reported(
    store: TeacherStore,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[TeacherStore], Path],
    words: str,
) -> None:
    named = spoil(store)
    assert main(["verify", store.url]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    violations = [line for line in lines if not line.startswith("note: ")]
    assert len(violations) == 1
    assert words in violations[0] and str(named) in violations[0]
    assert summary.endswith(", 1 violations")


def test_a_commit_that_contradicts_itself_is_told(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    miscount(store)
    assert main(["verify", store.url]) == 2
    err = capsys.readouterr().err
    assert "_delta_log/00000000000000000001.json: states num_added_rows = 100" in err


def test_an_id_in_two_windows_is_reported(
    store: TeacherStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the blocks of ids that are compared."""
    monkeypatch.setattr(verify, "_BLOCK", 2)
    for example_id in (0, 2, 1150):
        window = LATER if example_id < 1000 else {}
        plant(store, example_id=example_id, snapshot=3, **window)
    assert main(["verify", store.url]) == 1
    assert (
        f"{store.url}/outputs/teacher=fm: 3 ids are in several windows: 0, 2, 1150\n"
        in capsys.readouterr().out
    )


def test_verify_does_not_stop_at_the_first(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(store)
    plant(store, example_id=-4, output_buy=float("inf"))
    forget_checkpoint(store, "metadata.json")
    assert main(["verify", store.url]) == 1
    assert capsys.readouterr().out.endswith(
        "7 files, 434 rows, 2 snapshots, 1 checkpoints, 4 violations\n"
    )


def test_verify_of_checkpoints_kept_elsewhere(
    store: TeacherStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(Path(store.url) / "checkpoints", tmp_path / "elsewhere")
    assert main(["verify", store.url]) == 1
    assert main(["verify", store.url, "--checkpoints", str(tmp_path / "elsewhere")]) == 0
    capsys.readouterr()


def test_verify_of_an_object_store_notes_that_checkpoints_were_not_checked(
    store: TeacherStore,
) -> None:
    shutil.rmtree(Path(store.url) / "checkpoints")
    store.checkpoints = None
    verification = verify.Verification(store, print)
    assert verification.notes[0].startswith("checkpoints were not checked")
    assert (verification.counts["violations"], verification.counts["checkpoints"]) == (0, 0)


def test_compact_keeps_every_row(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    before, files = rows_of(store), set(Path(store.url).glob("outputs/*/*/*.parquet"))
    assert main(["compact", store.url]) == 0
    assert rows_of(store) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" files, ")[0] for line in lines] == ["before: 7", "after: 3"]
    window = store.read("fm", START // DAY)[0]
    assert (np.diff(window.example_id) >= 0).all() and len(window) == 232
    for file in store.files("fm", START // DAY):
        columns = pq.ParquetFile(f"{store.table.url}/{file.path}").metadata.row_group(0)
        assert "DELTA_BINARY_PACKED" in columns.column(0).encodings
    assert files < set(Path(store.url).glob("outputs/*/*/*.parquet"))  # none was removed
    assert main(["verify", store.url]) == 0


def test_compact_removes_files_only_if_told(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(store)
    assert main(["compact", store.url, "--vacuum-hours", "168"]) == 0
    assert "removed 0 files" in capsys.readouterr().out
    assert main(["compact", store.url, "--vacuum-hours", "0"]) == 0
    assert "removed 6 files" in capsys.readouterr().out
    assert len(list(Path(store.url).glob("outputs/*/*/*.parquet"))) == 3
    assert rows_of(store) == before


def test_forget(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(store)
    assert main(["forget", store.url, "fm", "--versions", "0-1,9"]) == 0
    remaining = [row for row in before if row[0] == "far" or row[4] == "2"]
    assert rows_of(store) == remaining and len(remaining) == 203
    assert [snapshot.version for snapshot in published(store, "fm")] == [2]
    assert len(list((Path(store.url) / "checkpoints/fm").iterdir())) == 1
    assert main(["verify", store.url]) == 0
    capsys.readouterr()


def test_show_two_teachers(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", store.url]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) <= 24 and err == ""
    for words in (
        "format 1, tasks ('click', 'buy'), windows of 86400 s, bfloat16",
        "fm version 2, trained through 2024-10-04T23:59:59Z, published 2",
        "outputs of fm: 2 window(s), 2024-10-04T00:00:00Z to 2024-10-05T00:00:00Z",
        "432 rows of 400 examples",
        "outputs of far: 1 window(s)",
        "ages 60 s to 62 s, median 61 s",
    ):
        assert words in out


def test_show_json(store: TeacherStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = [START + 69, START + 70, START]
    write(store, Snapshot("far", 7, START + 60), [4, -5, 6], times, bad_rows="quarantine")
    ids = [0, 0, 1, 2, 3]  # the first is in another window
    dates = pa.array([START + DAY, START, START, START, START], pa.timestamp("s"))
    pq.write_table(pa.table({"example_id": ids, "event_time": dates}), tmp_path / "ids.parquet")
    assert main(["show", store.url, "--json", "--ids", str(tmp_path / "ids.parquet")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"]["tasks"] == ["click", "buy"] and shown["commit"] == 8
    assert [(s["version"], s["checkpoint"]) for s in shown["snapshots"]] == [(1, True), (2, True)]
    assert shown["quarantined"] == {
        "have a negative example id": 1,
        "leak: their teacher was trained through their own event time": 1,
    }
    far, fm = shown["outputs"]
    assert (far["teacher"], far["rows"], far["examples"], far["coverage"]) == ("far", 4, 4, 0.6)
    assert far["ages"] == {"min": 9, "median": 60, "max": 62}
    assert (fm["rows"], fm["examples"], fm["files"], fm["coverage"]) == (432, 400, 6, 0.8)
    sizes = [file.stat().st_size for file in Path(store.url).glob("outputs/teacher=fm/*/*.parquet")]
    assert fm["bytes"] == sum(sizes) and fm["bytes_per_row"] == sum(sizes) / 432


def test_snapshots_whose_times_are_in_nanoseconds(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> Any:
        assert main(["show", "--json", store.url]) == 0
        known = published(TeacherStore(store.url), "fm")
        return json.loads(capsys.readouterr().out)["snapshots"], known

    before, table = shown(), Path(store.url) / "snapshots"
    for file in table.glob("*.parquet"):  # as Spark writes them
        rewrite(file, pq.ParquetFile(file).read(), table, use_deprecated_int96_timestamps=True)
        assert pq.ParquetFile(file).read().schema.field("trained_through").type.unit == "ns"
    assert before[1] and shown() == before


def test_ages_are_those_of_the_newest_outputs(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of version 0, and of age 0, are not; those logged as version 1 are."""
    assert main(["show", store.url, "--json"]) == 0
    fm = json.loads(capsys.readouterr().out)["outputs"][1]
    assert fm["ages"] == {"min": 0, "median": 991, "max": 1991}
    forget(store, "fm", versions=range(3))
    write(store, Snapshot("fm", 3, START), [8], [START], logged=True)
    assert main(["show", store.url, "--json"]) == 0
    fm = json.loads(capsys.readouterr().out)["outputs"][1]
    assert fm["ages"] == {"min": 0, "median": 0, "max": 0}


def test_show_a_teacher_without_a_good_row(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(store, teacher="bad", output_click=float("nan"))
    assert main(["show", store.url]) == 0
    assert "1 rows of 0 examples" in capsys.readouterr().out


def test_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = TeacherStore.create(tmp_path / "store")
    assert [main([command, store.url]) for command in ("show", "verify", "compact")] == [0, 0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{store.url}: commit 0, format 1, tasks ('label',)")
    assert lines[1].startswith("snapshots: 0")
    assert lines[2].endswith("0 files, 0 rows, 0 snapshots, 0 checkpoints, 0 violations")
    assert lines[3:] == ["before: 0 files, 0 bytes", "after: 0 files, 0 bytes"]


@pytest.mark.parametrize("command", ["show", "verify", "compact"])
def test_no_store(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{tmp_path / 'none'}/outputs: there is no store" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compact", "--vacuum-hours", "-1"], "at least 0; received -1"),
        (["show", "--ids", "/none.parquet"], "/none.parquet"),
        (["forget", "a' OR 'a", "--versions", "2"], "a teacher should be named"),
        (["forget", "fm"], "versions or before_seconds; received neither"),
        (["forget", "fm", "--versions", "2", "--before", "2026-01-01"], "received both"),
        (["forget", "fm", "--before", "1790000000000"], "milliseconds? divide by 1,000"),
    ],
)
def test_wrong_arguments(
    store: TeacherStore, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = rows_of(store)
    assert main([arguments[0], store.url, *arguments[1:]]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert rows_of(store) == before


def test_ids_without_a_time(
    store: TeacherStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"example_id": [1]}), tmp_path / "ids.parquet")
    assert main(["show", store.url, "--ids", str(tmp_path / "ids.parquet")]) == 2
    assert "lacks the columns ['event_time']" in capsys.readouterr().err


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    with contextlib.suppress(SystemExit):
        main(["compact", "--help"])
    assert "may miss files and fail" in " ".join(capsys.readouterr().out.split())


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchrec_exfm.das", "show", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_rows_of_a_missing_file_are_given_up_and_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TeacherStore.create(tmp_path)
    teacher = Snapshot("fm", 1, 1_000)
    for id_ in (1, 2):
        store.write(teacher, [id_], [0.5], [5_000])
    store.refresh()
    lost, remaining = store.files("fm", 0)
    (tmp_path / "outputs" / lost.path).unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["compact", str(tmp_path), "--repair"]) == 0
    assert lost.path in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    store.refresh()
    assert store.files("fm", 0) == [remaining]
    assert store.write(teacher, [1, 2], [0.5, 0.5], [5_000, 5_000]).written == 2

"""Look at a teacher store, verify it, compact it: ``python -m torchrec_exfm.das``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import dataset
from tqdm import tqdm

from torchrec_exfm.das.arrays import MICROSECONDS, Ints, among, utc
from torchrec_exfm.das.redaction import redacted
from torchrec_exfm.das.rules import newest
from torchrec_exfm.das.schema import FORMAT_VERSION
from torchrec_exfm.das.snapshots import NUMBERS, SCHEMA, forget_snapshots, registry_of
from torchrec_exfm.das.store import TeacherStore
from torchrec_exfm.das.verify import ERRORS, Verification

# In seconds: ages are told to the second up to 12 days, and beyond to 0.1 %.
_AGES = np.append(np.arange(1, 2**20), np.geomspace(2**20, 2**40, 2**14))
_SNAPSHOTS_SHOWN = 5
_KEPT_HOURS = 168  # the library refuses less, unless it is told not to


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if the store breaks a rule, 2 if the command can't be run."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ERRORS as error:
        print(f"error: {' '.join(redacted(str(error)).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    text = "A store of teachers' outputs. Options of an object store come from the environment."
    parser = argparse.ArgumentParser(prog="python -m torchrec_exfm.das", description=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("url", metavar="URL", help="of the store: a folder, s3://..., ...")
        added.set_defaults(run=run)
        return added.add_argument

    add = command(_show, "show", "Print what is in a store.")
    add("--json", action="store_true", help="as JSON")
    text = "also the coverage of these examples, which are held in memory: a file or folder with "
    text += "the columns example_id, and event_time (a timestamp) or event_seconds"
    add("--ids", metavar="PARQUET", help=text)
    folder: Any = {"type": Path, "metavar": "FOLDER", "help": "if it is not the store's own"}
    add = command(_verify, "verify", "Read all of a store; exit status 1 if it breaks a rule.")
    add("--checkpoints", **folder)
    add = command(_compact, "compact", "Make one sorted file of each window that has several.")
    text = "then remove the files that left the store more than H hours ago (without this, none); "
    text += f"below {_KEPT_HOURS}, jobs that read an older version may miss files and fail"
    add("--vacuum-hours", type=int, metavar="H", help=text)
    add("--repair", action="store_true", help="before, give up data files that are missing")
    add("--forget", metavar="TEACHER", help="before, delete this teacher's snapshots and outputs")
    add("--before", type=int, metavar="VERSION", help="of versions lower than this")
    add("--checkpoints", **folder)
    return parser


def _show(options: argparse.Namespace) -> int:
    store = TeacherStore(options.url)
    asked = None if options.ids is None else _examples(store, options.ids)
    left_out = Counter[str]()
    for commit in store.table.delta.history():
        left_out.update(json.loads(commit.get("quarantined", "{}")))
    shown: dict[str, Any] = {"url": store.url, "commit": store.table.version}
    shown["format"] = {"version": FORMAT_VERSION, **asdict(store.format)}
    shown["snapshots"] = _snapshots(store)
    store.format = replace(store.format, tasks=store.tasks[:1])  # one output is read, not all
    shown["outputs"] = [_outputs(store, teacher, asked) for teacher in store.teachers()]
    shown["quarantined"] = dict(left_out)
    print(json.dumps(shown, indent=2) if options.json else "\n".join(_lines(shown)))
    return 0


def _lines(shown: dict[str, Any]) -> Iterator[str]:
    """One short screen."""
    line = "format {version}, tasks {tasks}, windows of {window_seconds} s, {resolution}"
    yield f"{shown['url']}: commit {shown['commit']}, " + line.format(**shown["format"])
    yield f"snapshots: {len(shown['snapshots'])} (here, at most the last {_SNAPSHOTS_SHOWN})"
    for row in shown["snapshots"][-_SNAPSHOTS_SHOWN:]:
        line = "  {teacher} version {version}, trained through {trained_through}, published "
        line += "{published_at}, " + ("a checkpoint" if row["checkpoint"] else "no checkpoint")
        yield line.format(**row)
    for row in shown["outputs"]:
        yield "outputs of {teacher}: {windows} window(s), {first} to {last}".format(**row)
        yield "  {rows:,} rows of {examples:,} examples".format(**row)
        yield "  ages {min:,.0f} s to {max:,.0f} s, median {median:,.0f} s".format(**row["ages"])
        yield "  {bytes:,} bytes in {files:,} files, {bytes_per_row:,.1f} a row".format(**row)
        if "coverage" in row:
            yield f"  coverage {row['coverage']:.2%} of the examples asked for"
    for words, rows in shown["quarantined"].items():
        yield f"left out when written, as they {words}: {rows:,} rows"


def _snapshots(store: TeacherStore) -> list[dict[str, Any]]:
    registry, times = registry_of(store), ("trained_through", "published_at")
    tables = [registry.read(file, SCHEMA).cast(NUMBERS) for file in registry.files()]
    rows = [row for table in tables for row in table.to_pylist()]
    rows.sort(key=lambda row: (row["published_at"], row["version"]))
    for row in rows:
        row.update({name: utc(row[name] // MICROSECONDS) for name in times})
        row["checkpoint"] = row["checkpoint"] is not None
    return rows


def _outputs(store: TeacherStore, teacher: str, asked: tuple[Ints, Ints] | None) -> dict[str, Any]:
    """What there is of a teacher; ages are those of the newest output of each example."""
    covered, counts = 0, np.zeros(len(_AGES) + 1, dtype=np.int64)  # of ages between two of _AGES
    windows = store.windows(teacher)
    for window in windows:
        found = newest(store.read(teacher, window, bad_rows="quarantine")[0])
        steps = np.searchsorted(_AGES, found.age_seconds, side="right")
        counts += np.bincount(steps, minlength=len(counts))
        if asked is not None:
            of_window = slice(*np.searchsorted(asked[1], [window, window + 1]))
            covered += int(among(asked[0][of_window], np.sort(found.example_id)).sum())
    n = int(counts.sum())
    ranks = np.searchsorted(np.cumsum(counts), [min(n, 1), (n + 1) // 2, n])
    ages = np.append(0, _AGES)[ranks].tolist()
    files = [file for file in store.table.files() if file.partition[0] == teacher]
    size, rows = sum(file.size_bytes for file in files), sum(file.rows or 0 for file in files)
    shown = {
        "teacher": teacher,
        "windows": len(windows),
        "first": utc(windows[0] * store.format.window_seconds),
        "last": utc(windows[-1] * store.format.window_seconds),
        "rows": rows,
        "examples": n,
        "ages": dict(zip(("min", "median", "max"), ages, strict=True)),
        "bytes": size,
        "files": len(files),
        "bytes_per_row": size / max(rows, 1),
    }
    return shown if asked is None else {**shown, "coverage": covered / max(len(asked[0]), 1)}


def _examples(store: TeacherStore, path: str) -> tuple[Ints, Ints]:
    """Ids and windows (n,), by window."""
    data = dataset.dataset(path, format="parquet")
    time = "event_seconds" if "event_seconds" in data.schema.names else "event_time"
    if missing := {"example_id", time}.difference(data.schema.names):
        raise ValueError(f"{path}: lacks the columns {sorted(missing)}: has {data.schema.names}")
    table = data.to_table(columns=["example_id", time]).drop_null()
    seconds = table[time].cast(pa.timestamp("s", "UTC"), safe=False).cast(pa.int64())
    windows = store.window_of(seconds.to_numpy())
    order = np.argsort(windows, kind="stable")
    return table["example_id"].cast(pa.int64()).to_numpy()[order], windows[order]


def _verify(options: argparse.Namespace) -> int:
    store = TeacherStore(options.url)
    found = Verification(store, tqdm.write, options.checkpoints)
    for note in found.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{count:,} {what}" for what, count in found.counts.items())
    print(f"{store.url}, commit {store.table.version}: {counts}")
    return 1 if found.counts["violations"] else 0


def _compact(options: argparse.Namespace) -> int:
    store, hours = TeacherStore(options.url), options.vacuum_hours
    if (options.forget is None) != (options.before is None):
        raise ValueError("--forget TEACHER and --before VERSION should be given together")
    if hours is not None and hours < 0:
        raise ValueError(f"--vacuum-hours should be at least 0; received {hours}")
    print(f"before: {_size(store)}")
    if options.repair:
        missing = store.table.delta.repair()["files_removed"]
        print(f"given up: {len(missing)} files that were missing {', '.join(missing)}".rstrip())
    if options.forget is not None:
        forget_snapshots(store, options.forget, options.before, checkpoints=options.checkpoints)
    store.refresh()
    files = Counter(file.partition for file in store.table.files())
    for partition in tqdm([p for p, n in files.items() if n > 1], desc="compact", disable=None):
        store.table.compact(partition)
    store.refresh()
    print(f"after: {_size(store)}")
    if hours is not None:
        removed = store.table.delta.vacuum(hours, False, hours >= _KEPT_HOURS)
        print(f"removed {len(removed):,} files that were no part of it for {hours} hours")
    return 0


def _size(store: TeacherStore) -> str:
    files = store.table.files()
    return f"{len(files):,} files, {sum(file.size_bytes for file in files):,} bytes"


if __name__ == "__main__":
    sys.exit(main())

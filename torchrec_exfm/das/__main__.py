"""Inspect, verify, compact, prune and join a teacher store: ``python -m torchrec_exfm.das``."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pyarrow import dataset
from tqdm import tqdm

from torchrec_exfm.das.arrays import MICROSECONDS, Ints, among, as_int64, as_seconds, utc
from torchrec_exfm.das.join_files import join_files
from torchrec_exfm.das.redaction import redacted
from torchrec_exfm.das.rules import BadRows, Rows, newest
from torchrec_exfm.das.schema import FORMAT_VERSION
from torchrec_exfm.das.snapshots import forget, rows_of_registry
from torchrec_exfm.das.store import TeacherStore
from torchrec_exfm.das.verify import ERRORS, Verification

# Lower bounds of a histogram of ages, in seconds: exact up to 12 days, to 0.1 % beyond. Ages are
# counted, not kept, so that memory does not grow with the store.
_AGES = np.append(np.arange(1, 2**20), np.geomspace(2**20, 2**40, 2**14))
_SNAPSHOTS_SHOWN = 5
_RETENTION_HOURS = 168  # the library refuses to vacuum below it unless enforcement is off


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if the store breaks a rule, 2 if the command can't run."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (*ERRORS, TypeError, ModuleNotFoundError) as error:
        # one line, without the credentials that a URL among the arguments may hold
        print(f"error: {' '.join(redacted(str(error)).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    text = "Inspect and maintain a teacher store. Credentials come from the environment."
    parser = argparse.ArgumentParser(prog="python -m torchrec_exfm.das", description=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str) -> Any:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.add_argument("url", metavar="URL", help="the store: a folder, s3://..., ...")
        subparser.set_defaults(run=run)
        return subparser.add_argument

    add = command(_show, "show", "Print what a store holds.")
    add("--json", action="store_true", help="print JSON")
    text = "also print the coverage of these examples, which are held in memory: a file or folder "
    text += "with the columns example_id, and event_time (timestamps) or event_seconds"
    add("--ids", metavar="PARQUET", help=text)
    text = "where the checkpoints are (default: in the store's own folder)"
    folder: Any = {"type": Path, "metavar": "FOLDER", "help": text}
    add = command(_verify, "verify", "Check a whole store; exit with 1 if it breaks a rule.")
    add("--checkpoints", **folder)
    add = command(_compact, "compact", "Merge the files of each window into one sorted file.")
    text = "then remove files that left the store more than H hours ago (default: remove none); "
    text += f"below {_RETENTION_HOURS}, jobs that read an older version may miss files and fail"
    add("--vacuum-hours", type=int, metavar="H", help=text)
    text = "first drop data files that are missing, and so their rows, from the table's log"
    add("--repair", action="store_true", help=text)
    add = command(_forget, "forget", "Delete a teacher's versions, or its outputs before a time.")
    add("teacher", metavar="TEACHER", help="name of the teacher")
    text = "delete outputs, snapshots and checkpoints of these versions, such as 3 or 3,5-9"
    add("--versions", metavar="VERSIONS", type=_versions, help=text)
    text = "delete outputs of all versions in windows that ended by this time: 2026-01-31 (UTC), "
    text += "2026-01-31T06:00:00Z or epoch seconds"
    add("--before", metavar="TIME", type=_time, help=text)
    add("--checkpoints", **folder)
    _add_join(command(_join, "join", "Add teacher outputs to files of examples (needs DuckDB)."))
    return parser


def _add_join(add: Any) -> None:
    text = "local Parquet files: a file, a pattern or a folder; each gives a file of the same name"
    add("--examples", metavar="FILES", required=True, help=text)
    text = "folder of the joined files; those that exist already are not made again"
    add("--out", metavar="FOLDER", type=Path, required=True, help=text)
    add("--teacher", nargs="+", default=[], help="names (default: all teachers of the store)")
    add("--tasks", nargs="+", metavar="TASK", help="names (default: all tasks of the store)")
    add("--snapshot", type=int, metavar="VERSION", help="use outputs of this version only")
    text = "use no outputs of these versions, such as 3 or 3,5-9"
    add("--exclude", metavar="VERSIONS", type=_versions, default=[], help=text)
    add("--max-age-seconds", type=float, metavar="S", help="use no outputs older than S seconds")
    add("--embeddings", action="store_true", help="add the bytes of embeddings too")
    text = "column of the example ids (default: example_id)"
    add("--example-id", metavar="COLUMN", default="example_id", help=text)
    text = "column of the event times, timestamps or epoch seconds (default: event_seconds if the "
    text += "files have it, else event_time)"
    add("--event-time", metavar="COLUMN", help=text)
    text = "what to do with rows of the store that break a rule: refuse (stop with an error; the "
    text += "default) or quarantine (leave them out)"
    add("--bad-rows", choices=get_args(BadRows), default="refuse", help=text)
    text = "memory that DuckDB may use, such as 4GB; beyond it, the disk is used"
    add("--memory-limit", metavar="SIZE", help=text)


def _show(options: argparse.Namespace) -> int:
    store = TeacherStore(options.url)
    examples = None if options.ids is None else _examples(store, options.ids)
    quarantined = Counter[str]()
    for commit in store.table.delta.history():
        quarantined.update(json.loads(commit.get("quarantined", "{}")))
    summary: dict[str, Any] = {"url": store.url, "commit": store.table.version}
    summary["format"] = {"version": FORMAT_VERSION, **asdict(store.format)}
    summary["snapshots"] = _snapshots(store)
    summary["outputs"] = [_outputs(store, teacher, examples) for teacher in store.teachers()]
    summary["quarantined"] = dict(quarantined)
    print(json.dumps(summary, indent=2) if options.json else "\n".join(_lines(summary)))
    return 0


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one short screen."""
    line = "format {version}, tasks {tasks}, windows of {window_seconds} s, {resolution}"
    if summary["format"]["embedding_width"]:
        line += ", embeddings of {embedding_width} in {embedding_resolution}"
    yield f"{summary['url']}: commit {summary['commit']}, " + line.format(**summary["format"])
    yield f"snapshots: {len(summary['snapshots'])} (here, at most the last {_SNAPSHOTS_SHOWN})"
    for row in summary["snapshots"][-_SNAPSHOTS_SHOWN:]:
        line = "  {teacher} version {version}, trained through {trained_through}, published "
        line += "{published_at}, " + ("a checkpoint" if row["checkpoint"] else "no checkpoint")
        yield line.format(**row)
    for row in summary["outputs"]:
        yield "outputs of {teacher}: {windows} window(s), {first} to {last}".format(**row)
        yield "  {rows:,} rows of {examples:,} examples".format(**row)
        yield "  ages {min:,.0f} s to {max:,.0f} s, median {median:,.0f} s".format(**row["ages"])
        yield "  {bytes:,} bytes in {files:,} files, {bytes_per_row:,.1f} a row".format(**row)
        population = "the examples asked for" if "coverage" in row else "these examples"
        if "coverage" in row:
            yield f"  coverage {row['coverage']:.2%} of {population}"
        for version in row["versions"]:
            means = ", ".join(f"{task} {mean:.4g}" for task, mean in version["mean_output"].items())
            line = "  version {version}: {rows:,} rows in {windows} window(s), {first} to {last}"
            yield line.format(**version)
            yield f"    coverage {version['coverage']:.2%} of {population}, mean output {means}"
    for words, rows in summary["quarantined"].items():
        yield f"left out when written, as they {words}: {rows:,} rows"


def _snapshots(store: TeacherStore) -> list[dict[str, Any]]:
    times = "trained_through", "published_at"
    rows = sorted(rows_of_registry(store), key=lambda row: (row["published_at"], row["version"]))
    return [
        {
            "teacher": row["teacher"],
            "version": row["version"],
            **{name: utc(row[name] // MICROSECONDS) for name in times},
            "checkpoint": row["checkpoint"] is not None,
        }
        for row in rows
    ]


@dataclass
class _Version:
    """Counts of the outputs of one version of a teacher, added up window by window."""

    rows: int = 0
    covered: int = 0
    windows: list[int] = field(default_factory=list)
    outputs: Any = 0
    output_sums: Any = 0.0

    def add(self, window: int, rows: Rows, example_ids: Ints | None) -> None:
        self.rows += len(rows)
        ids = np.unique(rows.example_id)
        self.covered += len(ids) if example_ids is None else int(among(example_ids, ids).sum())
        self.windows.append(window)
        self.outputs = self.outputs + np.isfinite(rows.outputs).sum(axis=0)
        self.output_sums = self.output_sums + np.nansum(rows.outputs, axis=0, dtype=np.float64)

    def summary(self, store: TeacherStore, version: int, examples: int) -> dict[str, Any]:
        has_outputs = self.outputs > 0  # a task that a teacher does not know has no mean
        means = (self.output_sums[has_outputs] / self.outputs[has_outputs]).tolist()
        tasks = itertools.compress(store.tasks, has_outputs)
        return {
            "version": version,
            "rows": self.rows,
            "windows": len(self.windows),
            "first": utc(self.windows[0] * store.format.window_seconds),
            "last": utc(self.windows[-1] * store.format.window_seconds),
            "mean_output": dict(zip(tasks, means, strict=True)),
            "coverage": self.covered / max(examples, 1),
        }


def _outputs(
    store: TeacherStore, teacher: str, examples: tuple[Ints, Ints] | None
) -> dict[str, Any]:
    """Summarize a teacher's outputs; ages are those of the newest output of each example.

    ``examples`` are the ids and windows (n,) that coverage is asked for, sorted by window.
    """
    covered, counts = 0, np.zeros(len(_AGES) + 1, dtype=np.int64)  # of ages between two of _AGES
    versions = defaultdict[int, _Version](_Version)
    windows, ids = store.windows(teacher), None
    for window in windows:
        rows, _ = store.read(teacher, window, bad_rows="quarantine")
        if examples is not None:
            ids = examples[0][slice(*np.searchsorted(examples[1], [window, window + 1]))]
        for version in np.unique(rows.snapshot).tolist():
            versions[version].add(window, rows[rows.snapshot == version], ids)
        newest_rows = newest(rows)
        bins = np.searchsorted(_AGES, newest_rows.age_seconds, side="right")
        counts += np.bincount(bins, minlength=len(counts))
        if ids is not None:
            covered += int(among(ids, np.sort(newest_rows.example_id)).sum())
    n = int(counts.sum())
    ranks = np.searchsorted(np.cumsum(counts), [min(n, 1), (n + 1) // 2, n])
    ages = np.append(0, _AGES)[ranks].tolist()
    files = [file for file in store.table.files() if file.partition[0] == teacher]
    size, row_count = sum(file.size_bytes for file in files), sum(file.rows or 0 for file in files)
    total = n if examples is None else len(examples[0])
    summary = {
        "teacher": teacher,
        "windows": len(windows),
        "first": utc(windows[0] * store.format.window_seconds),
        "last": utc(windows[-1] * store.format.window_seconds),
        "rows": row_count,
        "examples": n,
        "ages": dict(zip(("min", "median", "max"), ages, strict=True)),
        "bytes": size,
        "files": len(files),
        "bytes_per_row": size / max(row_count, 1),
        "versions": [versions[v].summary(store, v, total) for v in sorted(versions)],
    }
    return summary if examples is None else {**summary, "coverage": covered / max(total, 1)}


def _examples(store: TeacherStore, path: str) -> tuple[Ints, Ints]:
    """Read the ids and windows (n,) of examples, sorted by window."""
    data = dataset.dataset(path, format="parquet")
    time = "event_seconds" if "event_seconds" in data.schema.names else "event_time"
    if missing := {"example_id", time}.difference(data.schema.names):
        raise ValueError(f"{path}: lacks the columns {sorted(missing)}: has {data.schema.names}")
    table = data.to_table(columns=["example_id", time])
    windows = store.window_of(as_seconds(f"{path}: {time}", table[time]))
    order = np.argsort(windows, kind="stable")
    return as_int64(f"{path}: example_id", table["example_id"])[order], windows[order]


def _verify(options: argparse.Namespace) -> int:
    store = TeacherStore(options.url, checkpoints=options.checkpoints)
    verification = Verification(store, tqdm.write)
    for note in verification.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{count:,} {name}" for name, count in verification.counts.items())
    print(f"{store.url}, commit {store.table.version}: {counts}")
    return 1 if verification.counts["violations"] else 0


def _forget(options: argparse.Namespace) -> int:
    store = TeacherStore(options.url, checkpoints=options.checkpoints)
    print(f"before: {_size(store)}")
    choice = {"versions": options.versions, "before_seconds": options.before}
    report = forget(store, options.teacher, **choice)
    print(
        f"forgotten: {report.rows:,} rows and {report.snapshots} snapshot(s) of {options.teacher}"
    )
    print(f"after: {_size(store)}; `compact --vacuum-hours H` removes files from the disk")
    return 0


def _join(options: argparse.Namespace) -> int:
    arguments = vars(options).copy()
    url, examples, out, teachers = map(arguments.pop, ("url", "examples", "out", "teacher"))
    del arguments["run"]
    report = join_files(TeacherStore(url), examples, out, teachers, **arguments)
    for teacher, left_out in report.left_out.items():
        covered = f"{report.present[teacher] / max(report.examples, 1):.2%}"
        print(f"{teacher}: an output for {covered} of {report.examples:,} examples")
        for words, rows in left_out.items():
            print(f"  left out, as they {words}: {rows:,} rows")
    return 0


def _versions(text: str) -> list[int]:
    """Parse versions such as ``3`` or ``3,5-9``."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < 1_000_000:
            raise argparse.ArgumentTypeError(
                f"versions should look like 3 or 3,5-9, a million at most; received {text!r}"
            )
        numbers += range(first, last + 1)
    return numbers


def _time(text: str) -> int:
    """Parse a time, as epoch seconds: a number of them, or a date and time (in UTC)."""
    if text.isdecimal() and len(text) != 8:  # 20260131 is a date
        return int(text)
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            "a time should look like 2026-01-31, 2026-01-31T06:00:00Z or epoch seconds; received "
            f"{text!r}"
        ) from error
    return int((time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp())


def _compact(options: argparse.Namespace) -> int:
    store, hours = TeacherStore(options.url), options.vacuum_hours
    if hours is not None and hours < 0:
        raise ValueError(f"--vacuum-hours should be at least 0; received {hours}")
    print(f"before: {_size(store)}")
    if options.repair:
        missing = store.table.repair()
        print(f"dropped {len(missing)} missing files {', '.join(missing)}".rstrip())
    store.refresh()
    files = Counter(file.partition for file in store.table.files())
    for partition in tqdm([p for p, n in files.items() if n > 1], desc="compact", disable=None):
        store.table.compact(partition)
    print(f"after: {_size(store)}")
    if hours is not None:
        removed = store.table.vacuum(hours, enforce=hours >= _RETENTION_HOURS)
        print(f"removed {len(removed):,} files that left the store over {hours} hours ago")
    return 0


def _size(store: TeacherStore) -> str:
    files = store.table.files()
    return f"{len(files):,} files, {sum(file.size_bytes for file in files):,} bytes"


if __name__ == "__main__":
    sys.exit(main())

"""How large a store gets and what it costs, extrapolated from measured costs.

    python benchmarks/sizing.py [--json] [--quick] [--write]

Costs of a row and of a look-up come from measured/store.cpu.json (random ids, bfloat16, one task),
those of the join from measured/join.cpu.json, those of scoring from measured/scoring.cpu.json,
where these files exist. They are of the machines that the files name. The costs of the table's log
are measured here: a store of 500 commits (--quick: 200), each of a few rows, is opened and brought
up to date. --write puts the tables into docs/sizing.md.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from torchrec_exfm.das import Snapshot, TeacherStore

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "sizing.md"
DAY, GIB = 86_400, 2**30
ROWS_A_DAY = (10**6, 10**8, 10**9, 10**10)
BUDGET = 16 * GIB  # of a host, for windows: two held, and one that is read
COMMIT_ROWS = 2**22  # of a commit where rows are many
LENGTHS = (86_400, 43_200, 21_600, 14_400, 7_200, 3_600, 1_800, 900, 600, 300, 120, 60)
HOSTS, DAYS, CORES = 50, 30, 16


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/sizing.md")
    options = parser.parse_args()
    costs = measured() | log_costs(200 if options.quick else 500)
    result = {"costs": costs, "sizes": [size(rows, costs) for rows in ROWS_A_DAY]}
    if options.json:
        print(json.dumps({**result, "environment": common.environment()}))
        return
    page = tables(result)
    print(page)
    if options.write:
        text = PAGE.read_text()
        marked = r"(<!-- sizing -->\n).*(<!-- end of sizing -->)"
        PAGE.write_text(re.sub(marked, lambda m: f"{m[1]}{page}\n{m[2]}", text, flags=re.DOTALL))


def measured() -> dict[str, float]:
    """Return the costs that other benchmarks have measured."""
    results = {
        file.name.removesuffix(".cpu.json"): json.loads(file.read_text())
        for file in (HERE / "measured").glob("*.cpu.json")
    }
    rows = results["store"]["details"]["random"]
    costs = {
        "bytes_on_disk": rows["bytes_per_row_on_disk"],
        "bytes_in_memory": rows["bytes_per_row_in_memory"],
        "bytes_while_read": rows["bytes_per_row_at_peak_of_read"],
        "rows_read_per_s": rows["read_rows_per_s"]["median"],
        "rows_looked_up_per_s": rows["lookup_rows_per_s"]["median"],
    }
    if "join" in results:
        costs["rows_joined_per_s"] = results["join"]["rows_per_s"]
    if "scoring" in results:
        scoring = results["scoring"]["details"]["one_rank"]["scoring"]
        costs["rows_scored_per_s_and_core"] = scoring["rows_per_s"]["median"]
    return costs


def log_costs(commits: int) -> dict[str, float]:
    """Measure the table's log: bytes and seconds of a commit, seconds to open and to refresh."""
    with tempfile.TemporaryDirectory(prefix="benchmark-sizing-") as folder:
        store = TeacherStore.create(folder, window_seconds=DAY)
        times: list[float] = []
        for number in range(commits):
            ids = np.arange(4) + 4 * number
            outputs, seconds = np.zeros(4, np.float32), np.full(4, DAY + number)
            snapshot = Snapshot("fm", 1, 1_000)
            times.append(common.timed(store.write, snapshot, ids, outputs, seconds)[0])
        opened = [common.timed(TeacherStore, folder)[0] for _ in range(5)]
        store.write(Snapshot("fm", 1, 1_000), [10**9], [0.0], [DAY])
        behind = TeacherStore(folder)
        behind.refresh(commits - 10)
        refreshed = common.timed(behind.refresh)[0]
        commits_of_log = Path(folder, "outputs", "_delta_log").glob("*.json")
        log_bytes = sum(file.stat().st_size for file in commits_of_log)
    return {
        "commits": commits,
        "log_bytes_a_commit": log_bytes / commits,
        "seconds_to_open": float(np.median(opened)),
        "seconds_to_refresh_by_ten": refreshed,
        "seconds_of_a_commit": float(np.median(times[-100:])),
        "seconds_of_a_commit_at_most": max(times[-150:]),  # one that writes a checkpoint of the log
    }


def size(rows: int, costs: dict[str, float]) -> dict[str, Any]:
    """Return the sizes and costs of a store that gets so many rows a day."""
    most = BUDGET / (costs["bytes_in_memory"] + costs["bytes_while_read"])
    length = next((s for s in LENGTHS if rows * s / DAY <= most), LENGTHS[-1])
    window = rows * length / DAY
    commits = max(DAY / length, rows / COMMIT_ROWS)
    joined, scored = costs.get("rows_joined_per_s"), costs.get("rows_scored_per_s_and_core")
    return {
        "rows_a_day": rows,
        "window_seconds": length,
        "rows_of_a_window": window,
        "held_bytes": 2 * window * costs["bytes_in_memory"],
        "peak_bytes": window * (costs["bytes_in_memory"] + costs["bytes_while_read"]),
        "seconds_to_load": window / costs["rows_read_per_s"],
        "reading_cores_a_host": rows / DAY / costs["rows_read_per_s"],
        "bytes_a_day": rows * costs["bytes_on_disk"],
        "commits_a_day": commits,
        "log_bytes_a_day": commits * costs["log_bytes_a_commit"],
        "seconds_to_open_after_a_day": costs["seconds_to_open"] * commits / costs["commits"],
        "look_up_core_hours": rows / costs["rows_looked_up_per_s"] / 3600,
        "join_hours": joined and rows / joined / 3600,
        "backfill_hours": scored and DAYS * rows / (HOSTS * CORES * scored) / 3600,
        "thirty_days_bytes": DAYS * rows * costs["bytes_on_disk"],
    }


def tables(result: dict[str, Any]) -> str:
    costs, sizes = result["costs"], result["sizes"]
    lines: Sequence[tuple[str, str, str]] = [
        ("window_seconds", "length of a window, s", "the longest with the peak in 16 GiB"),
        ("rows_of_a_window", "n, rows of a window", "R x length / 86,400"),
        ("held_bytes", "a host holds two windows", "2 n x memory"),
        ("peak_bytes", "a host's peak, while it reads one", "n (memory + while read)"),
        ("seconds_to_load", "to load a window, s", "n / read"),
        ("reading_cores_a_host", "cores that read, of each host", "R / 86,400 / read"),
        ("look_up_core_hours", "core hours of look-ups a day", "R / looked up / 3,600"),
        ("join_hours", "hours of a join a day, on one machine", "R / joined / 3,600"),
        ("bytes_a_day", "the store grows a day by", "R x disk"),
        ("thirty_days_bytes", "30 days kept", "30 R x disk"),
        ("commits_a_day", "commits a day", "one a window, or 2^22 rows in each"),
        ("log_bytes_a_day", "the log grows a day by", "commits x bytes a commit"),
        ("seconds_to_open_after_a_day", "to open a day's store, s", "files x seconds a file"),
        ("backfill_hours", "30 days by a new teacher, 50 hosts, h", "30 R / (50 x 16 x scored)"),
    ]
    header = ["", "formula", *(f"{s['rows_a_day']:.0e} rows a day".replace("+", "") for s in sizes)]
    body = [
        [text, formula, *(cell(name, s[name]) for s in sizes)]
        for name, text, formula in lines
        if sizes[0][name] is not None
    ]
    names = {
        "bytes_on_disk": "disk, bytes a row",
        "bytes_in_memory": "memory, bytes a row",
        "bytes_while_read": "while read, bytes a row at the peak",
        "rows_read_per_s": "read, rows a second and core",
        "rows_looked_up_per_s": "looked up, rows a second and core",
        "rows_joined_per_s": "joined, rows a second (a machine of 2 cores)",
        "rows_scored_per_s_and_core": "scored, rows a second and core (the benchmark's teacher)",
        "log_bytes_a_commit": "log, bytes a commit",
        "seconds_to_open": f"to open a store of {costs['commits']:,} commits, s",
        "seconds_to_refresh_by_ten": "to bring one up to date by ten commits, s",
        "seconds_of_a_commit": "a commit of a few rows, s",
        "seconds_of_a_commit_at_most": "... that writes a checkpoint of the log, s",
    }
    rows = [
        [text, common.cell(common.rounded(costs[name]))]
        for name, text in names.items()
        if name in costs
    ]
    machine = common.environment()
    return (
        common.table(["cost", "measured"], rows)
        + f"\n\n(the log: {machine['cpu']}, {machine['cores']} cores, deltalake "
        f"{machine['versions'].get('deltalake')})\n\n" + common.table(header, body)
    )


def cell(name: str, value: float) -> str:
    if "bytes" in name:
        for unit in ("B", "KB", "MB", "GB"):
            if value < 1000:
                return f"{value:.3g} {unit}"
            value /= 1000
        return f"{value:.3g} TB"
    return common.cell(common.rounded(value))


if __name__ == "__main__":
    main()

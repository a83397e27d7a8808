"""How fast published data sets are read as streams, and with how much memory.

    python benchmarks/readers.py [--quick] [--json]

Rows of each published form are made in a temporary folder, 250,000 and 1,000,000 (--quick: 25,000
and 100,000), and read in a process of their own. Memory is the peak of this process, less the peak
of one with the same imports. Both sizes are reported, to show how it grows.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import polars as pl
import published

ROWS = (250_000, 1_000_000)
QUICK_ROWS = (25_000, 100_000)
MIB = 2**20
_DAY = 86_400


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    imports = common.in_process(peak_bytes)
    result = {
        name: {str(rows): measure(name, rows, imports) for rows in size_pair(options.quick)}
        for name in MAKERS
    }
    result = {"readers": result, "environment": common.environment()}
    print(json.dumps(result) if options.json else markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Return a row for each data set, the smaller size before the larger."""
    few, many = (f"{int(rows):,}" for rows in next(iter(result["readers"].values())))
    head = ["rows", *(f"{unit}, {n}" for unit in ("rows/s", "peak MiB") for n in (few, many))]
    rows = [
        [name, *(size[figure] for figure in ("rows_per_s", "peak_mib") for size in sizes.values())]
        for name, sizes in result["readers"].items()
    ]
    return common.table(head, rows)


def size_pair(quick: bool) -> tuple[int, int]:
    return QUICK_ROWS if quick else ROWS


def measure(name: str, rows: int, imports: int) -> dict[str, float]:
    """Measure rows a second, MiB of the files and MiB of memory beyond `imports`."""
    with tempfile.TemporaryDirectory(prefix="benchmark-readers-") as work:
        folder = Path(work) / "published"
        folder.mkdir()
        common.in_process(MAKERS[name], folder, rows)
        seconds, peak = common.in_process(read, name, folder, Path(work) / "cache", rows)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "rows_per_s": round(rows / seconds),
        "file_mib": round(size / MIB),
        "peak_mib": round((peak - imports) / MIB),
    }


def read(name: str, folder: Path, cache: Path, rows: int) -> tuple[float, int]:
    """Build the stream, check its order; return seconds and the peak memory."""
    start = time.perf_counter()
    stream = getattr(published, name)(folder, cache)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    if len(stream) != rows or (np.diff(stream.time) < 0).any():
        raise RuntimeError(f"{rows} rows in order should come of {name}. Received: {len(stream)}")
    return seconds, peak


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_taobaoad(folder: Path, rows: int) -> None:
    """Make rows with the published numbers for a user and an ad; popularity is a power law."""
    rng = np.random.default_rng(0)
    users, ads = rows // 23, rows // 31
    click = (rng.random(rows) < 0.05).astype(int)
    sample = {
        "user": rng.integers(1, users + 1, rows),
        "time_stamp": 1_494_000_000 + rng.integers(0, 8 * _DAY, rows),
        "adgroup_id": rng.zipf(1.3, rows) % ads,
        "pid": rng.choice(["430548_1007", "430539_1007"], rows),
        "nonclk": 1 - click,
        "clk": click,
    }
    pl.DataFrame(sample).write_csv(folder / "raw_sample.csv")
    ad = np.arange(ads)
    names = ("cate_id", "campaign_id", "customer")
    about = dict(zip(names, (ad % 6769, ad // 2, ad // 4), strict=True))
    brand = pl.Series(ad % 100_000).cast(pl.String).set(pl.Series(ad % 3 == 0), "NULL")
    table = pl.DataFrame({"adgroup_id": ad, **about, "brand": brand, "price": ad % 1000 + 0.5})
    table.write_csv(folder / "ad_feature.csv")
    user = np.arange(1, users)  # not the last one
    sizes = dict(zip(list(published._PROFILE)[1:-1], (97, 13, 2, 7, 3, 3, 2), strict=True))
    profile = {"userid": user, **{name: user % size for name, size in sizes.items()}}
    table = pl.DataFrame({**profile, "new_user_class_level ": [None] * len(user)})
    table.write_csv(folder / "user_profile.csv")


def make_kuaivideo(folder: Path, rows: int) -> None:
    """Make rows of ten thousand users, with histories of up to a hundred items."""
    rng = np.random.default_rng(0)
    histories = history_lists(rng, 3_000_000, 100)
    click = (rng.random(rows) < 0.2).astype(int)
    columns = {
        "timestamp": np.sort(rng.integers(0, 10**12, rows)),
        "user_id": rng.integers(0, 10_000, rows),
        "item_id": rng.zipf(1.3, rows) % 3_000_000,
        "is_click": click,
        "is_like": click * (rng.random(rows) < 0.05),
        "is_follow": click * (rng.random(rows) < 0.05),
        "pos_items": rng.choice(histories, rows),
        "neg_items": rng.choice(histories, rows),
    }
    write_splits(folder, pl.DataFrame(columns), rows * 4 // 5)


def make_amazonelectronics(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    item = rng.integers(0, 63_001, rows)
    columns = {
        "label": rng.integers(0, 2, rows),
        "user_id": rng.integers(0, rows // 15, rows),
        "item_id": item,
        "cate_id": item % 801,
        "item_history": rng.choice(history_lists(rng, 63_001, 30), rows),
        "cate_history": rng.choice(history_lists(rng, 801, 30), rows),
    }
    write_splits(folder, pl.DataFrame(columns), rows * 13 // 15)


def make_criteo(folder: Path, rows: int) -> None:
    """Make two days with as many rows each."""
    rng = np.random.default_rng(0)
    words = np.array(["", *(f"{word:08x}" for word in rng.integers(0, 2**32, 100_000))], object)
    for day in range(2):
        size = rows // 2
        columns: dict[str, object] = {"label": (rng.random(size) < 0.03).astype(int)}
        for name in published._INTEGERS:
            values = rng.integers(-2, 1000, size)
            columns[name] = pl.Series(values).set(pl.Series(values % 5 == 0), None)
        columns |= {name: words[rng.integers(0, 100_001, size)] for name in published._CATEGORIES}
        table = pl.DataFrame(columns)
        table.write_csv(
            folder / f"day_{day}", include_header=False, separator="\t", quote_style="never"
        )


def history_lists(rng: np.random.Generator, items: int, longest: int) -> list[str]:
    """Return a thousand lists of up to the longest length, with `^` between items."""
    lengths = rng.integers(0, longest + 1, 1000)
    return ["^".join(map(str, rng.integers(0, items, length))) for length in lengths]


def write_splits(folder: Path, table: pl.DataFrame, train_rows: int) -> None:
    table[:train_rows].write_csv(folder / "train.csv", quote_style="never")
    table[train_rows:].write_csv(folder / "test.csv", quote_style="never")


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "taobaoad": make_taobaoad,
    "kuaivideo": make_kuaivideo,
    "amazonelectronics": make_amazonelectronics,
    "criteo": make_criteo,
}

if __name__ == "__main__":
    main()

"""Tables, tests and the picture of `quality.py`, from its figures and nothing else."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import report
import torch
from scipy import stats
from torchmetrics.functional.classification import binary_auroc

Array = npt.NDArray[Any]
Result = Mapping[str, Any]
FIGURES = ("ne", "auc", "calibration")
PLAIN = {
    **{"feed": "fresh", "width": 16, "shift": 0.0, "kept": 1.0, "corrected": False, "rates": None},
    "adapter": [1e-2, 32],
}
COST_FILE = Path(__file__).parent / "measured" / "amortization.cpu.json"

HEAD = """# Quality: when external distillation pays, by how much, and why

`make quality` runs all of this and writes this page from what it measured (`make quality QUICK=1`:
a small form of it). One pass in time order, each example scored before it is trained on; figures
over weeks 27 and later, which is half of the rows. A seed is that of the teacher and of its
students; every arm is compared with the student without a teacher of the same vertical and seed.
"± s" is the standard deviation over seeds of the mean over verticals, and p that of a paired,
two-sided t-test over seeds (it tells of the seeds' noise, not of other data). NE: normalized
entropy, the log-loss over that of always predicting the mean; lower is better. Transfer ratio: what
a student gains over what its teacher is better by. The tap is `model.over_arch.model.1`: the heads
share all but the last layer with the serving head.

Rates of the student without a teacher were chosen at batches of 256 on weeks 14 to 26, and hold for
all arms: for MovieLens the best of a grid over three verticals (`quality.py --tune`), for the
promotions by trials over eight. The grid, run later, has a slightly better one for the lean student
of the promotions; what the teacher brings there is at the end of this page. The arms were chosen on
the same weeks in trials that are not kept here, and the margin was added after an earlier form of
table 3 had shown that the adapter without one did not pay with a late teacher. The optimizers are
Adam and, for the tables, row-wise Adagrad.

Data: a year of retail promotions (departments are verticals), and MovieLens-1M (is a rating at
least four stars; primary genres are verticals), which differs in all that matters here: no negative
sampling, users that come once and do not return, and a teacher who knows little more than the
students.

Two students: **lean**, and **strong**, which also has the mean of earlier labels and the count of
earlier examples of the product and of the household with the product, category and manufacturer
(of the user, the movie, and the user with the genre).
"""


PICTURE = """
![The change of NE as the teacher grows old, calibration as it is biased, reliability, NE over \
time](quality.png)
"""


class Changes(NamedTuple):
    """Of an arm against none, in per cent.

    Attributes:
        ne, auc: (seeds, verticals).
        seeds, verticals: in the order of rows and columns.
        calibration: (seeds, verticals), as it is.
    """

    ne: Array
    auc: Array
    seeds: list[int]
    verticals: list[str]
    calibration: Array

    def less(self, other: Changes, figure: str) -> Array:
        """The difference of a figure, of the seeds and verticals that both have."""
        seeds = [s for s in self.seeds if s in other.seeds]
        verticals = [v for v in self.verticals if v in other.verticals]

        def part(of: Changes) -> Array:
            rows, columns = map(of.seeds.index, seeds), map(of.verticals.index, verticals)
            return getattr(of, figure)[np.ix_(list(rows), list(columns))]

        return part(self) - part(other)


def auc(logits: Array, labels: Array) -> float:
    target = torch.from_numpy(labels.astype(np.int64))
    # ranks, as torchmetrics would take logits beyond 0 to 1 through a sigmoid, and lose some
    ranks = torch.from_numpy(stats.rankdata(logits) / (len(logits) + 1))
    return float(binary_auroc(ranks, target))


def pick(results: Sequence[Result], **wanted: Any) -> list[Result]:
    """Those with the given values; fields not given have those of a plain cell."""
    wanted = {**PLAIN, **wanted}
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def swept(results: Sequence[Result], what: str) -> list[Result]:
    """Of the lean student on promotions, in the verticals and seeds of a sweep over one thing."""
    ours = [r for r in results if r["source"] == "promotions" and r["student"] == "lean"]
    changed = [r for r in ours if r[what] != PLAIN[what]]
    verticals, seeds = ({r[name] for r in changed} for name in ("vertical", "seed"))
    return [r for r in ours if r["vertical"] in verticals and r["seed"] in seeds]


def changes(results: Sequence[Result], **wanted: Any) -> Changes | None:
    """An arm against none with the same source, student, batch and sampling; None if not run."""
    arm = pick(results, **wanted)
    same = {k: v for k, v in wanted.items() if k in ("source", "student", "kept", "rates")}
    none = {(r["vertical"], r["seed"]): r for r in pick(results, arm="none", **same)}
    if not arm:
        return None
    names = list(dict.fromkeys(r["vertical"] for r in arm))
    seeds = sorted({r["seed"] for r in arm})
    by = {(r["vertical"], r["seed"]): r for r in arm}
    whole = [s for s in seeds if all((n, s) in by and (n, s) in none for n in names)]
    if not whole:
        return None

    def table(name: str, of: Mapping[Any, Result]) -> Array:
        return np.array([[of[n, s][name] for n in names] for s in whole])

    return Changes(
        100 * (table("ne", by) / table("ne", none) - 1),
        100 * (table("auc", by) / table("auc", none) - 1),
        whole,
        names,
        table("calibration", by),
    )


def p_value(values: Array) -> float:
    """Of a two-sided t-test that the mean is 0, over the seeds."""
    return float(stats.ttest_1samp(values, 0).pvalue) if len(values) > 1 else float("nan")


def mean_cell(values: Array, digits: int = 2) -> str:
    """(seeds, verticals) -> mean ± s (p)."""
    of_seeds = values.mean(1)
    if len(of_seeds) < 2:
        return f"{of_seeds.mean():+.{digits}f} %"
    s, p = of_seeds.std(ddof=1), p_value(of_seeds)
    return f"{of_seeds.mean():+.{digits}f} ± {s:.{digits}f} % (p {_p(p)})"


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def worse(change: Changes) -> list[str]:
    """The verticals where an arm is significantly worse: p < 0.05, over seeds, uncorrected."""
    return _worse(change.verticals, change.ne)


def _worse(verticals: Sequence[str], ne: Array) -> list[str]:
    columns = zip(verticals, ne.T, strict=True)
    return [name for name, values in columns if values.mean() > 0 and p_value(values) < 0.05]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def arms_of(results: Sequence[Result]) -> list[str]:
    """Those of the ablation, which are run with a fresh teacher."""
    arms = dict.fromkeys(r["arm"] for r in results if r["feed"] == "fresh")
    return [a for a in arms if a not in ("none", "teacher")]


def aims(results: Sequence[Result], recipe: str) -> Iterator[str]:
    """What was aimed at, and whether it was met."""
    yield f"\n## What was aimed at\n\nThe recipe: {recipe}.\n\n"
    yield markdown(
        ["aim", "measured", "met"], [*_gain_aims(results, recipe), *_teacher_aims(results, recipe)]
    )


def _gain_aims(results: Sequence[Result], recipe: str) -> Iterator[list[str]]:
    for student in ("lean", "strong"):
        change = changes(results, source="promotions", student=student, arm=recipe)
        if change is None:
            continue
        p, losers = p_value(change.ne.mean(1)), worse(change)
        if student == "lean":
            met = change.ne.mean() <= -1 and change.auc.mean() >= 1.1
            met = met and max(p, p_value(change.auc.mean(1))) < 0.01
            what = "NE at least 1.0 % lower, AUC at least 1.1 % higher, p < 0.01"
        else:
            met, what = change.ne.mean() < 0 and p < 0.05, "NE lower, p < 0.05"
        figures = (
            f"NE {mean_cell(change.ne)}, AUC {mean_cell(change.auc)}; median vertical "
            f"{np.median(change.ne.mean(0)):+.2f} %, {np.median(change.auc.mean(0)):+.2f} %"
        )
        yield [f"{student} student: {what}", figures, _yes(met)]
        yield [
            f"{student} student: no vertical worse, p < 0.05",
            ", ".join(losers) or "none",
            _yes(not losers),
        ]


def _teacher_aims(results: Sequence[Result], recipe: str) -> Iterator[list[str]]:
    shifted, aged = swept(results, "shift"), swept(results, "feed")
    for arm in ("AH", recipe):
        ratios = [_calibrations(shifted, arm, shift) for shift in shifts_of(results)]
        if len(ratios) > 1 and all(map(len, ratios)):
            means = [float(ratio.mean()) for ratio in ratios]
            met = all(abs(mean - 1) <= 0.02 for mean in means)
            met = met if len({r["seed"] for r in pick(shifted, arm=arm, shift=1.0)}) > 1 else None
            what = f"{arm}: serving calibration within 2 % of none's for every shift"
            yield [what, f"{min(means):.3f} to {max(means):.3f}", _yes(met)]
    for feed in feeds_of(results):
        late = feed == "frozen" or int(feed.removeprefix("delay-")) >= 8
        mine, ah = (changes(aged, arm=arm, feed=feed) for arm in (recipe, "AH"))
        if late and mine and ah:
            ne, auc = mine.less(ah, "ne"), mine.less(ah, "auc")
            what = f"teacher {feed}: the recipe at least as good as AH alone"
            behind = ", ".join(_worse(mine.verticals, ne)) or "none"
            figures = f"NE {mean_cell(ne)}, AUC {mean_cell(auc)}; NE behind in: {behind}"
            yield [what, figures, _as_good(ne, -auc)]


def _yes(met: bool | None) -> str:
    return "one seed says nothing" if met is None else "yes" if met else "**no**"


def _as_good(*differences: Array) -> str:
    """Whether differences, of which more is worse, are at most 0 in the mean over seeds."""
    if len(differences[0]) < 2:
        return _yes(None)
    behind = [d for d in differences if d.mean() > 0]
    if any(p_value(d.mean(1)) < 0.05 for d in behind):
        return _yes(False)
    return "within the noise" if behind else _yes(True)


def ablation(results: Sequence[Result], recipe: str) -> Iterator[str]:
    yield "\n## 1. Ablation\n"
    for source in dict.fromkeys(r["source"] for r in results):
        for student in ("lean", "strong"):
            yield from _ablation(results, source, student)
            yield from _beside_others(results, recipe, source=source, student=student)


def _ablation(results: Sequence[Result], source: str, student: str) -> Iterator[str]:
    teacher = changes(results, source=source, student=student, arm="teacher")
    if teacher is None:
        return
    none = pick(results, source=source, student=student, arm="none")
    base = [np.mean([r[f] for r in none if r["vertical"] in teacher.verticals]) for f in FIGURES]
    yield (
        f"\n### {source}, {student} student\n\nWithout a teacher: NE {base[0]:.4f}, AUC "
        f"{base[1]:.4f}, calibration {base[2]:.3f}; means over {len(teacher.verticals)} verticals "
        f"and {len(teacher.ne)} seeds. The teacher itself: NE {teacher.ne.mean():+.1f} %, AUC "
        f"{teacher.auc.mean():+.1f} %.\n\n"
    )
    rows, found = [], {}
    for arm in arms_of(results):
        change = changes(results, source=source, student=student, arm=arm)
        if change is None:
            continue
        transfer = change.ne.mean() / teacher.ne.mean()
        losers = ", ".join(worse(change)) or "none"
        calibration = f"{change.calibration.mean():.3f}"
        rows.append(
            [
                arm,
                mean_cell(change.ne),
                mean_cell(change.auc),
                *(f"{np.median(values.mean(0)):+.2f} %" for values in (change.ne, change.auc)),
                calibration,
                f"{transfer:.2f}",
                losers,
            ]
        )
        found[arm] = change
    head = [
        "arm",
        "NE",
        "AUC",
        "NE, median vertical",
        "AUC, median vertical",
        "calibration",
        "transfer ratio",
        "significantly worse in",
    ]
    yield markdown(head, rows)
    yield (
        "\nThe mean of AUC hangs on the vertical where it is low: NE and the median tell more. NE "
        "by vertical, change in % (* p < 0.05, ** p < 0.01, over seeds):\n\n"
    )
    yield _by_vertical("NE", teacher, {arm: change.ne for arm, change in found.items()})
    yield "\nAUC by vertical, change in %:\n\n"
    yield _by_vertical("AUC", teacher, {arm: change.auc for arm, change in found.items()})
    yield "\nCalibration, and the transfer ratio of NE, by vertical:\n\n"
    rows = [
        [
            arm,
            *(f"{c:.3f}, {r:.2f}" for c, r in zip(change.calibration.mean(0), ratio, strict=True)),
        ]
        for arm, change in found.items()
        for ratio in [change.ne.mean(0) / teacher.ne.mean(0)]
    ]
    yield markdown(["arm", *teacher.verticals], rows)


def _by_vertical(figure: str, teacher: Changes, arms: Mapping[str, Array]) -> str:
    """The changes of a figure, with their tests over seeds; the teacher's at the end."""
    rows = [[arm, *(f"{c.mean():+.2f}{_stars(c)}" for c in arms[arm].T)] for arm in arms]
    itself = getattr(teacher, figure.lower()).T
    rows.append(["teacher itself", *(f"{c.mean():+.1f}" for c in itself)])
    return markdown(["arm", *teacher.verticals], rows)


def _beside_others(results: Sequence[Result], recipe: str, **kind: str) -> Iterator[str]:
    """The recipe less each other arm."""
    mine = changes(results, arm=recipe, **kind)
    rows = []
    for arm in arms_of(results):
        other = changes(results, arm=arm, **kind)
        if mine and other and arm != recipe:
            rows.append([arm, *(mean_cell(mine.less(other, what)) for what in ("ne", "auc"))])
    if rows:
        yield f"\n{recipe} less each other arm, paired by seed:\n\n"
        yield markdown(["arm", "NE", "AUC"], rows)


def _stars(values: Array) -> str:
    p = p_value(values)
    return " **" if p < 0.01 else " *" if p < 0.05 else ""


def bias(results: Sequence[Result]) -> Iterator[str]:
    shifts, results = shifts_of(results), swept(results, "shift")
    spread = _spread_of(results, "shift").capitalize()
    yield (
        f"\n## 2. Bias: the teacher's logits shifted\n\n{spread};"
        " serving calibration over that of the student without a teacher, and the change of NE.\n\n"
    )
    rows = []
    for arm in arms_of(results):
        found = [changes(results, arm=arm, shift=shift) for shift in shifts]
        if all(found):
            ratios = [_calibrations(results, arm, shift).mean() for shift in shifts]
            cells = zip(ratios, found, strict=True)
            rows.append([arm, *(f"{r:.3f}, {change.ne.mean():+.2f} %" for r, change in cells)])
    yield markdown(["arm", *(f"{shift:+g}" for shift in shifts)], rows)


def shifts_of(results: Sequence[Result]) -> list[float]:
    return sorted({r["shift"] for r in results})


def _calibrations(results: Sequence[Result], arm: str, shift: float) -> Array:
    """An arm's calibration over none's, of each vertical and seed."""
    none = {(r["vertical"], r["seed"]): r["calibration"] for r in pick(results, arm="none")}
    picked = [
        (r["vertical"], r["seed"], r["calibration"]) for r in pick(results, arm=arm, shift=shift)
    ]
    return np.array([c / none[v, s] for v, s, c in picked if (v, s) in none])


def freshness(results: Sequence[Result]) -> Iterator[str]:
    feeds, results = feeds_of(results), swept(results, "feed")
    yield (
        "\n## 3. Freshness: the teacher is refreshed every week, and used some weeks later\n\n"
        f"{_spread_of(results, 'feed').capitalize()}; change of NE and AUC; the last rows are the "
        "difference of an arm with the adapter to AH alone, with the paired test. Frozen: after "
        "week 16.\n\n"
    )
    rows, by_arm = [], {}
    for arm in ["teacher", *arms_of(results)]:
        found = [changes(results, arm=arm, feed=feed) for feed in feeds]
        if any(change is None for change in found):
            continue
        by_arm[arm] = found
        rows.append([arm, *(f"{c.ne.mean():+.2f} %, {c.auc.mean():+.2f} %" for c in found)])
    for arm, found in by_arm.items():
        if "SA" in arm and "AH" in by_arm:
            pairs = list(zip(found, by_arm["AH"], strict=True))
            for what in ("ne", "auc"):
                cells = [mean_cell(c.less(a, what)) for c, a in pairs]
                rows.append([f"{arm} less AH, {what.upper()}", *cells])
    yield markdown(["arm", *feeds], rows)


def adapters(results: Sequence[Result], recipe: str) -> Iterator[str]:
    """The recipe's variants against AH, with the teacher that is oldest."""
    ours, usual = swept(results, "feed"), PLAIN["adapter"]
    late = [r for r in ours if r["feed"] == "frozen"]
    arms = [r["arm"] for r in late if r["arm"] not in ("teacher", *arms_of(ours))]
    kinds = {arm: {"arm": arm} for arm in dict.fromkeys([recipe, *arms])}
    for rate, width in sorted({tuple(r["adapter"]) for r in late} - {tuple(usual)}):
        kinds[f"adapter's rate {rate:g}, width {width}"] = {"arm": recipe, "adapter": [rate, width]}
    ah = changes(ours, arm="AH", feed="frozen")
    found = {name: changes(ours, feed="frozen", **kind) for name, kind in kinds.items()}
    if ah is None or len(found) < 2:
        return
    yield (
        "\nWhat the adapter's term needs, with the frozen teacher: variants of the recipe, and "
        f"their difference to AH alone. The recipe's margin is 0.25, its weights 1, the adapter's "
        f"rate {usual[0]:g} and width {usual[1]}.\n\n"
    )
    rows = [
        [name, *(mean_cell(c.less(ah, figure)) for figure in ("ne", "auc"))]
        for name, c in found.items()
        if c is not None
    ]
    yield markdown(["variant", "NE less AH's", "AUC less AH's"], rows)


def feeds_of(results: Sequence[Result]) -> list[str]:
    feeds = {r["feed"] for r in results} - {"fresh", "frozen"}
    order = sorted(feeds, key=lambda feed: int(feed.removeprefix("delay-")))
    return [*order, *(["frozen"] if any(r["feed"] == "frozen" for r in results) else [])]


def scale(results: Sequence[Result]) -> Iterator[str]:
    widths = sorted({r["width"] for r in results})
    if len(widths) < 2:
        return
    results = swept(results, "width")
    yield (
        f"\n## 4. Scale of the teacher\n\nThe width of its tables, which hold nearly all of its "
        f"parameters; {_spread_of(results, 'width')}. Change of NE.\n\n"
    )
    found = {
        arm: [changes(results, arm=arm, width=width) for width in widths]
        for arm in ("teacher", *arms_of(results))
    }
    whole = {arm: [c.ne for c in of if c] for arm, of in found.items() if all(of)}
    rows = [[arm, *map(mean_cell, values)] for arm, values in whole.items()]
    for arm, values in whole.items() if "teacher" in whole else ():
        ratios = [v.mean() / t.mean() for v, t in zip(values, whole["teacher"], strict=True)]
        if arm != "teacher":
            rows.append([f"{arm}, transfer ratio", *(f"{ratio:.3f}" for ratio in ratios)])
    yield markdown(["", *map(str, widths)], rows)


def _spread_of(results: Sequence[Result], what: str) -> str:
    """What the means of a sweep are over."""
    changed = [r for r in results if r[what] != PLAIN[what]]
    counts = [len({r[name] for r in changed}) for name in ("vertical", "seed")]
    return f"the lean student, means over {counts[0]} verticals and {counts[1]} seeds"


def one_to_n(results: Sequence[Result], recipe: str) -> Iterator[str]:
    """What one teacher gives to each of its students, and what they cost together."""
    found = {
        student: changes(results, source="promotions", student=student, arm=recipe)
        for student in ("lean", "strong")
    }
    there = {student: change for student, change in found.items() if change is not None}
    if not there:
        return
    yield f"\n## 5. One teacher, many students\n\nThe recipe, {recipe}, vertical by vertical.\n\n"
    names = next(iter(there.values())).verticals
    rows = [
        [f"{student}, {what.upper()}", *map(mean_cell, getattr(change, what).T[:, :, None])]
        for student, change in there.items()
        for what in ("ne", "auc")
    ]
    yield markdown(["student", *names], rows)
    yield _cost(json.loads(COST_FILE.read_text()))


def _cost(amortization: Mapping[str, Any]) -> str:
    """From the benchmark of that name, whose models are larger than the ones here."""
    by_students = amortization["details"]["by_students"]
    ways = {
        "stored once, as here": "logged",
        "each asks the teacher": "codistillation",
        "a teacher for each": "teacher_for_each",
    }
    rows = [
        [name, *(f"{n['extra_over_plain'][way]['median']:+.0%}" for n in by_students.values())]
        for name, way in ways.items()
    ]
    return (
        "\nWhat the teacher adds to the cost of training the students: medians of the amortization "
        "benchmark, with its models ([README.md](README.md) has the spread):\n\n"
    ) + markdown(["way", *(f"N = {n}" for n in by_students)], rows)


def sampling(results: Sequence[Result]) -> Iterator[str]:
    shares = sorted({r["kept"] for r in results} - {1.0})
    if not shares:
        return
    share, results = shares[0], swept(results, "kept")
    yield (
        f"\n## 6. Sampling\n\nThe student trains on {share:.0%} of the stream's negatives; the "
        "teacher on all of them, and the stream itself holds about one in a hundred. Calibration "
        "to the stream and to all promoted pairs, of the logits as they are and after the "
        "correction z + log r, r being the share that was kept: of the stream's negatives, and of "
        "those of the example's basket. Told: the library knows the student's rate, so that the "
        f"teacher's logits are moved to it. {_spread_of(results, 'kept').capitalize()}.\n\n"
    )
    rows = []
    for arm, told in itertools.product(["none", *arms_of(results)], (False, True)):
        picked = pick(results, arm=arm, kept=share, corrected=told)
        if not picked:
            continue
        change = changes(results, arm=arm, kept=share, corrected=told)
        figures = np.mean(
            [[*r["unsampled"]["stream"], *r["unsampled"]["pairs"]] for r in picked], 0
        )
        name = arm if arm == "none" else f"{arm}, {'told' if told else 'not told'}"
        gain = mean_cell(change.ne) if change and arm != "none" else ""
        rows.append([name, gain, *(f"{figure:.3g}" for figure in figures)])
    head = ["arm", "NE", "to the stream, raw", "corrected", "to all pairs, raw", "corrected"]
    yield markdown(head, rows)


def batches(results: Sequence[Result]) -> Iterator[str]:
    others = {json.dumps(r["rates"]): r["rates"] for r in results if r["rates"]}
    if others:
        yield (
            "\n## Other settings of the student\n\nBetter ones for it than those above: smaller "
            "batches, which take longer, and other rates.\n"
        )
    for rates, arm in itertools.product(others.values(), arms_of(results)):
        for student in ("lean", "strong"):
            kind = {"source": "promotions", "student": student, "rates": rates, "arm": arm}
            change = changes(results, **kind)
            if change is not None:
                yield (
                    f"\nBatches of {rates[0]}, rates {rates[1]:g} and (tables) {rates[2]:g}, "
                    f"{student} student, {arm}: NE {mean_cell(change.ne)}, AUC "
                    f"{mean_cell(change.auc)}; {len(change.verticals)} verticals, "
                    f"{len(change.seeds)} seeds.\n"
                )


def page(kept: Mapping[str, Any], ranking: Iterable[str] = ()) -> str:
    results = kept["results"]
    recipe = kept["recipe"]
    tables = itertools.chain(
        ablation(results, recipe),
        bias(results),
        freshness(results),
        adapters(results, recipe),
        scale(results),
        one_to_n(results, recipe),
        sampling(results),
        ranking,
        batches(results),
    )
    ran, planned = len(results), kept.get("planned", len(results))
    through = f"\n**Not through: {ran:,} of {planned:,} runs.**\n" if ran < planned else ""
    text = "".join([HEAD, through, PICTURE, *aims(results, recipe), *tables])
    return f"{text}\n{report.machine(kept['environment'])}\n"


def put_section(page: str, section: str) -> str:
    """The page with a section in the place of the one of that heading, or before its last."""
    heading = section.lstrip().splitlines()[0]
    parts = re.split(r"(?=\n## )", page)
    at = [part.lstrip().startswith(f"{heading}\n") for part in parts]
    if True in at:
        parts[at.index(True)] = section
    else:
        parts.insert(-1, section)
    return "".join(parts)


def draw(results: Sequence[Result], path: Path) -> None:
    """Freshness, bias, reliability and NE over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    _draw_freshness(axes[0, 0], results)
    _draw_bias(axes[0, 1], results)
    _draw_reliability(axes[1, 0], results)
    _draw_weeks(axes[1, 1], results)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_freshness(axes: Any, results: Sequence[Result]) -> None:
    feeds, results = feeds_of(results), swept(results, "feed")
    for arm in arms_of(results):
        found = [changes(results, arm=arm, feed=feed) for feed in feeds]
        if all(found):
            means = [c.ne.mean(1) for c in found]
            spread = [m.std(ddof=1) if len(m) > 1 else 0 for m in means]
            names = [feed.removeprefix("delay-") for feed in feeds]
            axes.errorbar(
                names, [m.mean() for m in means], spread, label=arm, capsize=3, marker="o"
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Freshness", xlabel="weeks the teacher is late", ylabel="NE against none, %")
    axes.legend(fontsize=8)


def _draw_bias(axes: Any, results: Sequence[Result]) -> None:
    shifts, results = shifts_of(results), swept(results, "shift")
    for arm in arms_of(results):
        means = [
            [r["calibration"] for r in pick(results, arm=arm, shift=shift)] for shift in shifts
        ]
        if all(means):
            axes.plot(shifts, [np.mean(m) for m in means], label=arm, marker="o")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title="Bias", xlabel="shift of the teacher's logits", ylabel="serving calibration")
    axes.legend(fontsize=8)


def _draw_reliability(axes: Any, results: Sequence[Result]) -> None:
    results = swept(results, "shift")
    for arm, shift in (("none", 0.0), *((arm, 1.0) for arm in arms_of(results))):
        picked = pick(results, arm=arm, shift=shift, seed=0)
        bins = np.array([r["bins"] for r in picked])
        if len(bins):
            predicted, label = bins[:, :, 0].mean(0), bins[:, :, 1].mean(0)
            axes.loglog(
                predicted, label, marker="o", label=arm + (" (teacher +1)" if shift else "")
            )
    axes.axline((1e-3, 1e-3), (1, 1), color="black", linewidth=0.8)
    axes.set(title="Reliability", xlabel="mean prediction of a tenth", ylabel="mean label")
    axes.legend(fontsize=8)


def _draw_weeks(axes: Any, results: Sequence[Result]) -> None:
    results = swept(results, "feed")
    none = {(r["vertical"], r["seed"]): r for r in pick(results, arm="none")}
    aged = {r["arm"] for r in results if r["feed"] != "fresh"}
    for arm in [arm for arm in arms_of(results) if arm in aged]:
        weeks: dict[int, list[float]] = {}
        for r in pick(results, arm=arm, seed=0):
            base = none.get((r["vertical"], r["seed"]))
            for mine, its in zip(r["weeks"], base["weeks"] if base else [], strict=bool(base)):
                weeks.setdefault(mine[0], []).append(100 * (mine[2] / its[2] - 1))
        if weeks:
            axes.plot(list(weeks), [np.mean(v) for v in weeks.values()], label=arm)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Over time", xlabel="week", ylabel="log-loss against none, %")
    axes.legend(fontsize=8)


def as_text(kept: Mapping[str, Any]) -> str:
    """JSON, a line for each result, numbers to six digits; no more than is shown."""
    text = _as_text(kept, map(_short, kept["results"]))
    if "ranking" not in kept:
        return f"{text}\n"
    ranked = _as_text(kept["ranking"], map(_short_ranked, kept["ranking"]["results"]))
    return f'{text[:-1]},\n"ranking": {ranked}}}\n'


def _as_text(kept: Mapping[str, Any], results: Iterable[Result]) -> str:
    lines = ",\n".join(map(json.dumps, results))
    head = json.dumps({name: kept[name] for name in ("recipe", "planned", "environment")})
    return f'{head[:-1]},\n"results": [\n{lines}\n]}}'


def _short_ranked(result: Result) -> dict[str, Any]:
    cell = ("source", "vertical", "student", "arm", "seed")
    figures = ("rows", "groups", *FIGURES, "group_auc", "ndcg")
    return {name: _rounded(result[name]) for name in (*cell, *figures)}


def _short(result: Result) -> dict[str, Any]:
    drawn = result["source"] == "promotions" and result["student"] == "lean"
    drawn = drawn and result["seed"] == 0 and result["feed"] == "fresh"
    dropped = {"early_ne", "seconds", "group_auc", "ndcg", "groups"}
    dropped |= set() if drawn else {"weeks", "bins"}
    dropped |= {"unsampled"} if result["kept"] == PLAIN["kept"] else set()
    return {name: _rounded(value) for name, value in result.items() if name not in dropped}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_page(kept: Mapping[str, Any], folder: Path, ranking: Iterable[str] = ()) -> None:
    """QUALITY.md and quality.png; the first is printed as well."""
    missing = {"weeks": [], "bins": []}
    results = [{**missing, **result} for result in kept["results"]]
    text = page({**kept, "results": results}, ranking)
    draw(results, folder / "quality.png")
    (folder / "QUALITY.md").write_text(text)
    print(text)

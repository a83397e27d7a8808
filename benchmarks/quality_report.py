"""Tables, tests and the picture of `quality.py`, from its figures and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import report
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from torchrec_exfm.study.figures import Array, Changes, changes_of, generation_ratio, p_value
from torchrec_exfm.study.report import line_style, markdown, mean_cell, p_text

Result = Mapping[str, Any]
PLAIN = {
    **{"feed": "fresh", "width": 16, "shift": 0.0, "kept": 1.0, "corrected": False, "rates": None},
    **{"adapter": [1e-2, 32], "teacher": "rich"},
}
CELL = ("source", "vertical", "student", "arm", "seed", *PLAIN)
STUDENTS = ("lean", "strong")
CONTROL, RECIPE = "head on the label", "AH + SA by margin"

HEAD = """# Quality: when external distillation pays, by how much, and why

`make quality` runs all of this and writes this page from what it measured (`make quality QUICK=1`:
a small form of it). One pass in time order, each example scored before it is trained on; figures
over the later half: weeks 27 and later, or days 8 to 14. A seed is that of the teacher and of its
students; every arm is compared with the student without a teacher of the same vertical and seed.
"± s" is the standard deviation over seeds of the mean over verticals, and p that of a paired,
two-sided t-test over seeds (it tells of the seeds' noise, not of other data). NE: normalized
entropy, the log-loss over that of always predicting the mean; lower is better.

Two ratios, which are not to be mixed. **η** is the share of the teacher's lead that the student
gets: (NE of none - NE of the arm) / (NE of none - NE of the teacher). The **generation ratio** is
what students gain from a new teacher over an older one, over what the teacher itself gained: (NE of
the arm by the old - by the new) / (NE of the old teacher - of the new); the older one here is of
the same size and sees what the strong student sees.

**Head on the label** is the control: a second head like AH's that learns the label, without any
teacher. What it brings is not the teacher's.

Seeds are five, and three in the sweeps, which are all tables but 1, 6 and 10, and for the arms of
EB-NeRD in table 1 that have GS, LS, LW or SA but the recipe. Sweeps are of fewer verticals but for
freshness: PRODUCE, DELI and MEAT-PCKGD; Drama, Horror and Adventure; the front page on mobile
devices and the article page on desktops.

Data: a year of retail promotions (departments are verticals); MovieLens-1M (is a rating at least
four stars; primary genres are verticals), which has no negative sampling, users that come once, and
a teacher who knows little more than the students; and two weeks of a news site's pages, EB-NeRD's
demo (is an article in view clicked; verticals are front and article pages, on mobile devices and
desktops), where items are hours old.

Two students: **lean**, and **strong**, which also has the mean of earlier labels and the count of
earlier examples of the product and of the household with the product, category and manufacturer
(of the user, the movie, and the user with the genre; of the article, the user, and both). The tap
is `model.over_arch.model.1`: the heads share all but the last layer with the serving head.

Rates of the student without a teacher were chosen at batches of 256 on weeks 14 to 26 (days 4 to
7), and hold for all arms: by a grid (`quality.py --tune`), for the promotions by trials over eight
settings; the grid, run later, has a slightly better one for their lean student, see the end of this
page. EB-NeRD's teacher has the best of nine settings on days 4 to 7; the others' were not tuned.
The arms were chosen on the same weeks of the promotions in trials that are not kept here, and the
margin was added after an earlier form of table 3 had shown that the adapter without one did not pay
with a late teacher. Nothing of the arms was chosen on MovieLens or EB-NeRD. The optimizers are Adam
and, for the tables, row-wise Adagrad.
"""

PICTURE = """
![The change of NE as the teacher grows old, calibration as it is biased, the gain by the \
teacher's lead](quality.png)
"""


def pick(results: Sequence[Result], **wanted: Any) -> list[Result]:
    """Those with the given values; fields not given have those of a plain cell."""
    wanted = {**PLAIN, **wanted}
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def changes(results: Sequence[Result], *, auc: str = "auc", **wanted: Any) -> Changes | None:
    """An arm against none with the same source, student, batch and sampling; None if not run."""
    same = {k: v for k, v in wanted.items() if k in ("source", "student", "kept", "rates")}
    base = "none, late" if ", late" in wanted["arm"] else "none"
    return changes_of(pick(results, **wanted), pick(results, arm=base, **same), ("ne", auc))


def swept(results: Sequence[Result], source: str, what: str) -> list[Result]:
    """Of the lean student, in the verticals and seeds of a sweep over one thing."""
    ours = [r for r in results if (r["source"], r["student"]) == (source, "lean")]
    changed = [r for r in ours if r[what] != PLAIN[what]]
    verticals, seeds = ({r[name] for r in changed} for name in ("vertical", "seed"))
    return [r for r in ours if r["vertical"] in verticals and r["seed"] in seeds]


def spread_of(results: Sequence[Result]) -> str:
    """What the means of a sweep are over."""
    verticals, seeds = (len({r[name] for r in results}) for name in ("vertical", "seed"))
    return f"the lean student, means over {verticals} verticals and {seeds} seeds"


def kinds_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    sources = dict.fromkeys(r["source"] for r in results)
    return list(itertools.product(sources, STUDENTS))


def arms_of(results: Sequence[Result]) -> list[str]:
    """Those of the tables that compare arms that were run, in their order."""
    arms = {r["arm"] for r in results}
    return [arm for arm in SHOWN if arm in arms]


SHOWN = (  # in the tables that compare arms
    CONTROL,
    "serving head",
    "AH",
    "AH + GS",
    "AH + LS",
    "AH + LW",
    "AH + SA",
    "SA on serving",
    RECIPE,
)


def in_short(results: Sequence[Result]) -> Iterator[str]:
    """The recipe on each stream and student."""
    yield f"\n## In short\n\nThe recipe is {RECIPE}. NE against the same student alone.\n\n"
    rows = []
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        found = [changes(results, arm=arm, **kind) for arm in ("teacher", "AH", RECIPE, CONTROL)]
        teacher, ah, recipe, control = found
        if teacher and ah and recipe:
            cells = [f"{teacher.ne.mean():+.1f} %", mean_cell(ah.ne), mean_cell(recipe.ne)]
            cells += ["" if control is None else mean_cell(control.ne)]
            worse = ", ".join(recipe.worse()) or "none"
            rows.append([f"{source}, {student}", *cells, f"{recipe.eta(teacher):.2f}", worse])
    head = ["", "the teacher itself", "AH", "recipe", CONTROL, "η of the recipe"]
    yield markdown([*head, "recipe significantly worse in"], rows)


def ablation(results: Sequence[Result]) -> Iterator[str]:
    yield "\n## 1. Ablation\n"
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        teacher = changes(results, arm="teacher", **kind)
        found = {arm: changes(results, arm=arm, **kind) for arm in arms_of(results)}
        done = {arm: change for arm, change in found.items() if change is not None}
        if teacher is not None and done:
            yield from _ablation(results, kind, teacher, done)


def _ablation(
    results: Sequence[Result],
    kind: Mapping[str, str],
    teacher: Changes,
    found: Mapping[str, Changes],
) -> Iterator[str]:
    none = [r for r in pick(results, arm="none", **kind) if r["vertical"] in teacher.parts]
    ne, auc, calibration = (np.mean([r[f] for r in none]) for f in ("ne", "auc", "calibration"))
    older = changes(results, arm="teacher", teacher="strong", **kind)
    before = ""
    if older is not None:
        new, old = teacher.common(older, "ne").mean(), older.ne.mean()
        before = f"; in the sweeps {new:+.1f} %, and the generation before {old:+.1f} %"
    yield (
        f"\n### {kind['source']}, {kind['student']} student\n\nWithout a teacher: NE {ne:.4f}, AUC "
        f"{auc:.4f}, calibration {calibration:.3f}; means over {len(teacher.parts)} verticals and "
        f"{len(teacher.ne)} seeds. The teacher itself: NE {teacher.ne.mean():+.1f} %, AUC "
        f"{teacher.auc.mean():+.1f} %{before}.\n\n"
    )
    pages = kind["source"] == "ebnerd"
    rows = []
    for arm, change in found.items():
        old = changes(results, arm=arm, teacher="strong", **kind)
        ratio = ""
        if old is not None and older is not None:
            ratio = f"{generation_ratio(change, old, teacher, older):.2f}"
        row = [arm, mean_cell(change.ne), mean_cell(change.auc)]
        if pages:
            within = changes(results, auc="group_auc", arm=arm, **kind)
            row.append("" if within is None else mean_cell(within.auc))
        less_control = ""
        if CONTROL in found and arm != CONTROL:
            less_control = mean_cell(change.less(found[CONTROL]))
        eta = "" if arm == CONTROL else f"{change.eta(teacher):.2f}"
        calibrations = f"{change.calibration.mean():.3f}"
        row += [less_control, calibrations, eta, ratio, ", ".join(change.worse()) or "none"]
        rows.append(row)
    head = ["arm", "NE", "AUC", *(["AUC within pages"] if pages else []), "NE less the control's"]
    head += ["calibration", "η", "generation ratio", "significantly worse in"]
    yield markdown(head, rows)
    yield "\nNE by vertical, change in % (* p < 0.05, ** p < 0.01, over seeds):\n\n"
    rows = []
    for arm, change in {**found, "teacher itself": teacher}.items():
        by_part = dict(zip(change.parts, change.ne.T, strict=True))
        told = {p: f"{ne.mean():+.2f}{_stars(ne)}" for p, ne in by_part.items()}
        rows.append([arm, *(told.get(part, "") for part in teacher.parts)])
    yield markdown(["arm", *teacher.parts], rows)
    if RECIPE in found and "AH" in found:
        mine, ah = found[RECIPE], found["AH"]
        cells = [mean_cell(mine.less(ah, figure)) for figure in ("ne", "auc")]
        yield f"\n{RECIPE} less AH, paired by seed: NE {cells[0]}, AUC {cells[1]}.\n"


def _stars(values: Array) -> str:
    p = p_value(values)
    return " **" if p < 0.01 else " *" if p < 0.05 else ""


def over_sources(
    results: Sequence[Result], what: str, table: Callable[[str, list[Result]], Iterator[str]]
) -> Iterator[str]:
    """A sweep's table for each stream that it was run on."""
    for source in dict.fromkeys(r["source"] for r in results):
        if part := swept(results, source, what):
            yield f"\n{source}; {spread_of(part)}:\n\n"
            yield from table(source, part)


def bias(results: Sequence[Result]) -> Iterator[str]:
    def table(source: str, part: list[Result]) -> Iterator[str]:
        shifts, rows = sorted({r["shift"] for r in part}), []
        for arm in arms_of(part):
            found = [changes(part, arm=arm, shift=shift) for shift in shifts]
            ratios = [_calibrations(part, arm, shift) for shift in shifts]
            if all(change is not None for change in found):
                pairs = zip(ratios, found, strict=True)
                rows.append(
                    [arm, *(f"{r.mean():.3f}, {c.ne.mean():+.2f} %" for r, c in pairs if c)]
                )
        yield markdown(["arm", *(f"{shift:+g}" for shift in shifts)], rows)

    yield (
        "\n## 2. Bias: the teacher's logits shifted\n\nServing calibration over that of the "
        "student without a teacher, and the change of NE.\n"
    )
    yield from over_sources(results, "shift", table)


def _calibrations(results: Sequence[Result], arm: str, shift: float) -> Array:
    """An arm's calibration over none's, of each vertical and seed."""
    none = {(r["vertical"], r["seed"]): r["calibration"] for r in pick(results, arm="none")}
    shifted = pick(results, arm=arm, shift=shift)
    ids = ((r, (r["vertical"], r["seed"])) for r in shifted)
    return np.array([r["calibration"] / none[cell] for r, cell in ids if cell in none])


def freshness(results: Sequence[Result]) -> Iterator[str]:
    def table(source: str, part: list[Result]) -> Iterator[str]:
        feeds, rows, by_arm = feeds_of(part), [], {}
        for arm in ["teacher", *arms_of(part)]:
            found = [changes(part, arm=arm, feed=feed) for feed in feeds]
            if all(change is not None for change in found):
                by_arm[arm] = [change for change in found if change]
                rows.append([arm, *(f"{c.ne.mean():+.2f} %" for c in by_arm[arm])])
        for arm in ("AH + SA", RECIPE):
            if arm in by_arm and "AH" in by_arm:
                pairs = zip(by_arm[arm], by_arm["AH"], strict=True)
                rows.append([f"{arm} less AH", *(mean_cell(c.less(ah)) for c, ah in pairs)])
        yield markdown(["arm", *feeds], rows)

    yield (
        "\n## 3. Freshness: a teacher that is refreshed every week (EB-NeRD: hour), and late\n\n"
        "delay-D: D weeks (hours) later than it could be. Frozen: after week 16 (day 4). Change of "
        "NE; the last rows are the difference of an arm to AH alone, with the paired test.\n"
    )
    yield from over_sources(results, "feed", table)


def feeds_of(results: Sequence[Result]) -> list[str]:
    feeds = {r["feed"] for r in results} - {"fresh", "frozen"}
    order = sorted(feeds, key=lambda feed: int(feed.removeprefix("delay-")))
    return [*order, *(["frozen"] if any(r["feed"] == "frozen" for r in results) else [])]


def adapters(results: Sequence[Result], variants: Iterable[str]) -> Iterator[str]:
    """The recipe's variants against AH, with the teacher that is oldest."""
    ours, usual = swept(results, "promotions", "feed"), PLAIN["adapter"]
    kinds: dict[str, dict[str, Any]] = {arm: {"arm": arm} for arm in (RECIPE, *variants)}
    for rate, width in sorted({tuple(r["adapter"]) for r in ours} - {tuple(usual)}):
        kinds[f"adapter's rate {rate:g}, width {width}"] = {"arm": RECIPE, "adapter": [rate, width]}
    ah = changes(ours, arm="AH", feed="frozen")
    found = {name: changes(ours, feed="frozen", **kind) for name, kind in kinds.items()}
    if ah is None:
        return
    yield (
        "\nWhat the adapter's term needs, on the promotions with the frozen teacher: variants of "
        "the recipe, and their difference to AH alone. The recipe's margin is 0.25, its weights 1, "
        f"the adapter's rate {usual[0]:g} and width {usual[1]}.\n\n"
    )
    rows = [[name, mean_cell(c.less(ah))] for name, c in found.items() if c is not None]
    yield markdown(["variant", "NE less AH's"], rows)


def scale(results: Sequence[Result]) -> Iterator[str]:
    part = swept(results, "promotions", "width")
    widths = sorted({r["width"] for r in part})
    if len(widths) < 2:
        return
    yield (
        "\n## 4. Scale of the teacher\n\nThe width of its tables, which hold nearly all of its "
        f"parameters; promotions, {spread_of(part)}. Change of NE.\n\n"
    )
    rows, teacher = [], [changes(part, arm="teacher", width=width) for width in widths]
    for arm in ("teacher", "AH", RECIPE):
        found = [changes(part, arm=arm, width=width) for width in widths]
        rows.append([arm, *(mean_cell(c.ne) for c in found if c)])
        if arm != "teacher":
            etas = [f"{c.eta(t):.3f}" for c, t in zip(found, teacher, strict=True) if c and t]
            rows.append([f"{arm}, η", *etas])
    yield markdown(["", *map(str, widths)], rows)
    for arm in ("AH", RECIPE):
        new, old = (changes(part, arm=arm, width=width) for width in (widths[-1], widths[0]))
        if new and old and teacher[0] and teacher[-1]:
            ratio = generation_ratio(new, old, teacher[-1], teacher[0])
            yield f"\nGeneration ratio from {widths[0]} to {widths[-1]} wide, {arm}: {ratio:.2f}.\n"


def sampling(results: Sequence[Result]) -> Iterator[str]:
    part = swept(results, "promotions", "kept")
    if not part:
        return
    share = min(r["kept"] for r in part)
    yield (
        f"\n## 5. Sampling\n\nThe student trains on {share:.0%} of the stream's negatives; the "
        "teacher on all of them, and the stream itself holds about one in a hundred. Calibration "
        "to the stream and to all promoted pairs, of the logits as they are and after the "
        "correction z + log r, r being the share that was kept: of the stream's negatives, and of "
        "those of the example's basket. Told: the library knows the student's rate, so that the "
        f"teacher's logits are moved to it. Promotions, {spread_of(part)}.\n\n"
    )
    rows = []
    for arm, told in itertools.product(["none", *arms_of(part)], (False, True)):
        picked = pick(part, arm=arm, kept=share, corrected=told)
        if not picked:
            continue
        change = changes(part, arm=arm, kept=share, corrected=told)
        figures = np.mean(
            [[*r["unsampled"]["stream"], *r["unsampled"]["pairs"]] for r in picked], 0
        )
        name = arm if arm == "none" else f"{arm}, {'told' if told else 'not told'}"
        gain = mean_cell(change.ne) if change and arm != "none" else ""
        rows.append([name, gain, *(f"{figure:.3g}" for figure in figures)])
    head = ["arm", "NE", "to the stream, raw", "corrected", "to all pairs, raw", "corrected"]
    yield markdown(head, rows)


def mechanisms(results: Sequence[Result], arms: Iterable[str]) -> Iterator[str]:
    """What ExFM's successors do otherwise, against AH of the same seeds."""
    yield (
        "\n## 7. What successors do otherwise\n\nNE less AH's, paired by seed. *AH + label*: the "
        "auxiliary head learns the mean of the teacher's probability and the label, at weight 2 "
        "(Rec-Distill's auxiliary tower). *AH + serving head*: the teacher on both. *alpha 5, w "
        "10, beta 20*: as a digest of the paper has them. *Unlabelled rows*: beside each example "
        "one of another vertical, without its label, and as many labels a step. *Late*: the "
        "student starts in week 14 (day 4), without or with the teacher's tables of that time, "
        "projected (CrossAdapt); its figures are NE against the late student alone.\n\n"
    )
    kinds = kinds_of(results)
    names = [arm for arm in (CONTROL, *arms) if arm != "none, late"]
    rows = []
    for arm in names:
        row = [arm]
        for source, student in kinds:
            kind = {"source": source, "student": student}
            mine, ah = changes(results, arm=arm, **kind), changes(results, arm="AH", **kind)
            late = ", late" in arm
            if mine is None or ah is None:
                row.append("")
            else:
                row.append(mean_cell(mine.ne if late else mine.less(ah)))
        rows.append(row)
    yield markdown(["arm", *(f"{source}, {student}" for source, student in kinds)], rows)


LEADS = (1, 4, 8, 12, 30)  # per cent of NE
TAUGHT_BY = {
    "rich": "the teacher",
    "domain": "a domain model that it taught",
    "domain alone": "a domain model that nobody taught",
    "rich+domain": "the teacher and the domain model",
    "rich+noise": "the teacher and noise",
}


def two_teachers(results: Sequence[Result], arms: Iterable[str]) -> Iterator[str]:
    """A model between the teacher and its students, and a teacher that knows nothing."""
    if not any(r["teacher"] == "domain" for r in results):
        return
    yield (
        "\n## 8. A hierarchy, and a teacher of noise\n\nPromotions. The domain model has the "
        "strong student's features and the teacher's network, and goes through the examples of all "
        "seven departments; the teacher teaches it (AH), and it the students. Noise: a second "
        "teacher whose logits are random. Change of NE, and less the same arm by the teacher alone "
        "(AH, or the recipe), paired by seed.\n\n"
    )
    between = [r for r in results if r["teacher"] == "domain"]
    cells = {(r["vertical"], r["seed"]) for r in between}
    part = [r for r in results if (r["vertical"], r["seed"]) in cells]
    rows = []
    for by, arm in itertools.product(TAUGHT_BY, ("teacher", "AH", RECIPE, *arms)):
        row = [f"{TAUGHT_BY[by]}, {'itself' if arm == 'teacher' else arm}"]
        for student in STUDENTS:
            kind = {"source": "promotions", "student": student}
            change = changes(part, arm=arm, teacher=by, **kind)
            one = "AH" if arm.startswith("AH of") else RECIPE if arm.startswith("recipe") else arm
            alone = changes(part, arm=one, **kind)
            less = mean_cell(change.less(alone)) if change and alone and by != "rich" else ""
            row += [mean_cell(change.ne) if change else "", less]
        if any(row[1:]):
            rows.append(row)
    head = [f"{student}{what}" for student in STUDENTS for what in ("", ", less the teacher alone")]
    yield markdown(["taught by, arm", *head], rows)


def what_decides(results: Sequence[Result]) -> Iterator[str]:
    """The gain of each vertical against the lead of its teacher."""
    yield (
        "\n## 9. What decides\n\nOf each vertical and student: the teacher's lead, and what arms "
        "bring (changes of NE in %, means over seeds).\n\n"
    )
    points, rows = gains_by_lead(results), []
    for source, student in kinds_of(results):
        part = [p for p in points if (p["source"], p["student"]) == (source, student)]
        if part:
            lead, ah, recipe = (np.array([p[of] for p in part]) for of in ("lead", "AH", RECIPE))
            shown = (-lead, ah / lead, recipe / lead)
            cells = [f"{np.median(x):.2f} ({x.min():.2f} to {x.max():.2f})" for x in shown]
            rows.append([f"{source}, {student}", *cells, f"{np.mean(recipe - ah):+.2f}"])
    head = ["median (range)", "the teacher's lead", "η of AH", "η of the recipe", "recipe less AH"]
    yield markdown(head, rows)
    if len(points) < 3:
        return
    lead, ah, gain = (np.array([p[n] for p in points]) for n in ("lead", "AH", RECIPE))
    less = gain - ah
    led, rows_of = -lead >= LEADS[0], np.array([p["rows"] for p in points])
    shares, strong = (ah / lead)[led], np.array([p["student"] == "strong" for p in points])[led]
    low, middle, high = np.percentile(shares, [10, 50, 90])
    tests = {
        "the lead and the recipe's gain": (-lead, -gain),
        "the lead and what the recipe brings beyond AH": (-lead, -less),
        "the number of examples and AH's η": (rows_of[led], shares),
        "being the strong student and AH's η": (strong, shares),
    }
    told = [
        f"{name} {test.statistic:.2f} (p {p_text(test.pvalue)})"
        for name, pair in tests.items()
        for test in [stats.spearmanr(*pair)]
    ]
    yield (
        f"\nRank correlations over these {len(points)} verticals and students, η where the teacher "
        f"leads by {LEADS[0]} % or more: of {'; of '.join(told)}. AH's η: 10th percentile "
        f"{low:.2f}, median {middle:.2f}, 90th {high:.2f}. By the lead, medians and ranges:\n\n"
    )
    rows = []
    for low, high in itertools.pairwise(LEADS):
        at = (-lead >= low) & (-lead < high)
        if at.any():
            shown = (-ah[at], ah[at] / lead[at], -gain[at], gain[at] / lead[at])
            cells = [f"{np.median(x):.2f} ({x.min():.2f} to {x.max():.2f})" for x in shown]
            rows.append([f"{low} to {high} % ({at.sum()})", *cells, f"{less[at].mean():+.2f}"])
    head = ["lead (how many)", "gain of AH, %", "η of AH", "gain of the recipe, %"]
    yield markdown([*head, "η of the recipe", "recipe less AH, mean"], rows)


def gains_by_lead(results: Sequence[Result]) -> list[dict[str, Any]]:
    points = []
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        found = {arm: changes(results, arm=arm, **kind) for arm in ("teacher", "AH", RECIPE)}
        means = [dict(zip(c.parts, c.ne.mean(0), strict=True)) for c in found.values() if c]
        for part in means[0] if len(means) == len(found) else ():
            if all(part in by_part for by_part in means):
                lead, ah, recipe = (by_part[part] for by_part in means)
                rows = np.mean(
                    [r["rows"] for r in pick(results, arm="none", **kind, vertical=part)]
                )
                points.append({**kind, "lead": lead, "AH": ah, RECIPE: recipe, "rows": rows})
    return points


def batches(results: Sequence[Result]) -> Iterator[str]:
    others = {json.dumps(r["rates"]): r["rates"] for r in results if r["rates"]}
    if not others:
        return
    yield (
        "\n## Other settings of the student\n\nPromotions. Better ones for it than those above, "
        "smaller batches, which take longer, and other rates.\n\n"
    )
    rows = []
    for rates, arm, student in itertools.product(others.values(), ("AH", RECIPE), STUDENTS):
        kind = {"source": "promotions", "student": student, "rates": rates, "arm": arm}
        change = changes(results, **kind)
        if change is not None:
            told = f"{rates[0]}, {rates[1]:g}, {rates[2]:g}"
            over = f"{len(change.parts)}, {len(change.seeds)}"
            rows.append([told, student, arm, mean_cell(change.ne), mean_cell(change.auc), over])
    yield markdown(
        ["batch, rate, of tables", "student", "arm", "NE", "AUC", "verticals, seeds"], rows
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw freshness, bias and the gain by the teacher's lead; each title states what is shown."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    draw_freshness(panels[0], swept(results, "promotions", "feed"))
    draw_bias(panels[1], swept(results, "promotions", "shift"))
    draw_leads(panels[2], results)
    for axes in panels:
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=9)
    for axes, side in ((panels[0], "left"), (panels[2], "right")):
        handles, labels = axes.get_legend_handles_labels()
        if len(handles) > 1:
            options = {"loc": f"outside lower {side}", "ncols": 3, "fontsize": 9}
            figure.legend(handles, labels, **options)
    figure.savefig(path, dpi=150)


def draw_freshness(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the change of NE by how late the teacher is."""
    axes.axhline(0, label="student alone", **line_style("none"))
    axes.set(xlabel="weeks the teacher is late", ylabel="change of NE, %", title="Freshness")
    feeds = feeds_of(results)
    for arm in SHOWN:
        means = [c.ne.mean(1) for feed in feeds if (c := changes(results, arm=arm, feed=feed))]
        if len(means) < len(feeds) or not means:
            continue
        names = [feed.removeprefix("delay-") for feed in feeds]
        levels, spread = [m.mean() for m in means], [m.std() for m in means]
        axes.errorbar(names, levels, spread, capsize=3, marker=".", label=arm, **line_style(arm))
        if arm == RECIPE:
            axes.set_title(
                f"Late teacher, {RECIPE}:\nNE from {levels[0]:+.1f} % to {levels[-1]:+.1f} %"
            )


def draw_bias(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the serving calibration by the shift of the teacher's logits."""
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="shift of the teacher's logits", ylabel="serving calibration", title="Bias")
    shifts, ranges = sorted({r["shift"] for r in results}), {}
    for arm in SHOWN:
        cells = [[r["calibration"] for r in pick(results, arm=arm, shift=s)] for s in shifts]
        if not cells or not all(cells):
            continue
        levels = [float(np.mean(cell)) for cell in cells]
        axes.plot(shifts, levels, marker=".", label=arm, **line_style(arm))
        ranges[arm] = f"{min(levels):.2f} to {max(levels):.2f}"
    if RECIPE in ranges and "serving head" in ranges:
        axes.set_title(
            f"A biased teacher: calibration {ranges[RECIPE]},\n"
            f"{ranges['serving head']} on the serving head"
        )


def draw_leads(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the recipe's gain of each vertical and student by the teacher's lead."""
    axes.axhline(0, **line_style("none"))
    axes.set(xlabel="lead of the teacher, % of NE", ylabel=f"gain by {RECIPE}, % of NE")
    points, color = gains_by_lead(results), line_style(RECIPE)["color"]
    markers = dict(zip(dict.fromkeys(p["source"] for p in points), "osD^v", strict=False))
    for source, student in kinds_of(results):
        part = [p for p in points if (p["source"], p["student"]) == (source, student)]
        leads, gains = ([-p[name] for p in part] for name in ("lead", RECIPE))
        if part:
            axes.plot(
                *(leads, gains, markers[source]),
                color=color,
                markerfacecolor=color if student == "strong" else "none",
                label=f"{source}, {student}",
            )
    title = "Gain by lead"
    if len(points) > 2:
        correlation = stats.spearmanr(*([p[name] for p in points] for name in ("lead", RECIPE)))
        title = (
            f"Gain by lead, {len(points)} students:\nrank correlation {correlation.statistic:.2f}"
        )
    axes.set_title(title)


def merged(
    kept: Mapping[str, Any],
    new: Sequence[Result],
    planned: Mapping[Any, str],
    environment: Mapping[str, Any],
) -> str:
    """What is kept with what was measured now, as JSON: a line for each result.

    Args:
        kept: from the file, or nothing.
        new: results of cells.
        planned: the cells of all tables, with their keys: what is kept of one under another key was
            of other settings, and goes.
        environment: of the new ones.
    """
    wanted = {cell_of(asdict(cell)): key for cell, key in planned.items()}
    cells = {
        cell_of(r): r
        for r in kept.get("results", ())
        if wanted.get(cell_of(r), r["key"]) == r["key"]
    }
    environments = list(kept.get("environments", ()))
    fresh = [r for r in new if cell_of(r) not in cells]
    for result in fresh:
        cells[cell_of(result)] = {**_short(result), "run": len(environments)}
    missing = len(wanted.keys() - cells.keys())
    told = {"missing": missing, "environments": environments + [environment] * bool(fresh)}
    lines = ",\n".join(map(json.dumps, cells.values()))
    return f'{json.dumps(told)[:-1]},\n"results": [\n{lines}\n]}}\n'


def cell_of(result: Result) -> str:
    """All that tells a cell from others, as text."""
    return json.dumps([{**PLAIN, **result}[name] for name in CELL])


def _short(result: Result) -> dict[str, Any]:
    cell = {**PLAIN, **result}
    grouped = cell["source"] == "ebnerd" or cell["vertical"] == "MEAT-PCKGD"
    dropped = {"early_ne", *(() if grouped else ("group_auc", "ndcg", "groups"))}
    short = {
        name: value
        for name, value in result.items()
        if name not in dropped and (name not in PLAIN or value != PLAIN[name])
    }
    digits: dict[str, Any] = json.loads(
        json.dumps(short), parse_float=lambda text: float(f"{float(text):.6g}")
    )
    return digits


def write_page(
    kept: Mapping[str, Any],
    folder: Path,
    ranking: Callable[[Sequence[Result]], Iterator[str]],
    memory: Callable[[Sequence[Result]], Iterator[str]],
    names: Mapping[str, Iterable[str]],
) -> str:
    """QUALITY.md and quality.png; the first is returned as well."""
    results = [{**PLAIN, **r, "part": r["vertical"]} for r in kept["results"]]
    tables = itertools.chain(
        in_short(results),
        ablation(results),
        bias(results),
        freshness(results),
        adapters(results, names["variants"]),
        scale(results),
        sampling(results),
        ranking(results),
        mechanisms(results, names["mechanisms"]),
        two_teachers(results, names["two teachers"]),
        what_decides(results),
        memory(results),
        batches(results),
    )
    missing = kept["missing"]
    through = f"\n**Not through: {missing:,} runs are missing.**\n" if missing else ""
    machines = "\n\n".join(dict.fromkeys(map(report.machine, kept["environments"])))
    text = f"{HEAD}{through}{PICTURE}{''.join(tables)}\n{machines}\n"
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder / "quality.png")
    (folder / "QUALITY.md").write_text(text)
    return text

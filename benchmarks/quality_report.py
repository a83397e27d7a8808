"""The tables of the quality page and their tests, from the results of `quality.py`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from torchrec_exfm.study.figures import Array, Changes, compare_arms, generation_ratio, p_value
from torchrec_exfm.study.report import markdown, mean_cell, p_text

Result = Mapping[str, Any]
PLAIN = {
    **{"feed": "fresh", "width": 16, "shift": 0.0, "kept": 1.0, "corrected": False, "rates": None},
    **{"adapter": [1e-2, 32], "teacher": "rich"},
}
CELL = ("source", "vertical", "student", "arm", "seed", *PLAIN)
STUDENTS = ("lean", "strong")
CONTROL, RECIPE = "head on the label", "AH + SA by margin"


def pick(results: Sequence[Result], **wanted: Any) -> list[Result]:
    """Return the results with the given values; other fields have those of a plain cell."""
    wanted = {**PLAIN, **wanted}
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def changes(results: Sequence[Result], *, auc: str = "auc", **wanted: Any) -> Changes | None:
    """Return an arm's changes against none of the same source, student, batch and sampling.

    None if either was not run.
    """
    same = {k: v for k, v in wanted.items() if k in ("source", "student", "kept", "rates")}
    base = "none, late" if ", late" in wanted["arm"] else "none"
    return compare_arms(pick(results, **wanted), pick(results, arm=base, **same), ("ne", auc))


def swept(results: Sequence[Result], source: str, field: str) -> list[Result]:
    """Return the lean student's results in the verticals and seeds of a sweep over a field."""
    lean = [r for r in results if (r["source"], r["student"]) == (source, "lean")]
    changed = [r for r in lean if r[field] != PLAIN[field]]
    verticals, seeds = ({r[name] for r in changed} for name in ("vertical", "seed"))
    return [r for r in lean if r["vertical"] in verticals and r["seed"] in seeds]


def spread_of(results: Sequence[Result]) -> str:
    """Say what the means of a sweep are over."""
    verticals, seeds = (len({r[name] for r in results}) for name in ("vertical", "seed"))
    return f"the lean student, means over {verticals} verticals and {seeds} seeds"


def kinds_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return the streams that were run, each with both students."""
    sources = dict.fromkeys(r["source"] for r in results)
    return list(itertools.product(sources, STUDENTS))


def arms_of(results: Sequence[Result]) -> list[str]:
    """Return the arms of `SHOWN` that were run, in its order."""
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


def ablation(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 1: every arm on each stream and student."""
    yield (
        "\n## 1. Ablation\n\nEvery arm on each stream and student. NE and AUC are changes "
        "against none, means over verticals; *less the control's*: less the change by the head on "
        "the label.\n"
    )
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        teacher = changes(results, arm="teacher", **kind)
        by_arm = {
            arm: change
            for arm in arms_of(results)
            if (change := changes(results, arm=arm, **kind)) is not None
        }
        if teacher is not None and by_arm:
            yield from _ablation(results, kind, teacher, by_arm)


def _ablation(
    results: Sequence[Result],
    kind: Mapping[str, str],
    teacher: Changes,
    by_arm: Mapping[str, Changes],
) -> Iterator[str]:
    none = [r for r in pick(results, arm="none", **kind) if r["vertical"] in teacher.parts]
    ne, auc, calibration = (np.mean([r[f] for r in none]) for f in ("ne", "auc", "calibration"))
    older = changes(results, arm="teacher", teacher="strong", **kind)
    generations = ""
    if older is not None:
        new, old = teacher.common(older, "ne").mean(), older.ne.mean()
        generations = f"; in the sweeps {new:+.1f} %, and the generation before {old:+.1f} %"
    yield (
        f"\n### {kind['source']}, {kind['student']} student\n\nWithout a teacher: NE {ne:.4f}, AUC "
        f"{auc:.4f}, calibration {calibration:.3f}; means over {len(teacher.parts)} verticals and "
        f"{len(teacher.ne)} seeds. The teacher itself: NE {teacher.ne.mean():+.1f} %, AUC "
        f"{teacher.auc.mean():+.1f} %{generations}.\n\n"
    )
    within_pages = ["AUC within pages"] if kind["source"] == "ebnerd" else []
    head = ["arm", "NE", "AUC", *within_pages, "NE less the control's"]
    head += ["calibration", "η", "generation ratio", "significantly worse in"]
    rows = []
    for arm, change in by_arm.items():
        row = [arm, mean_cell(change.ne), mean_cell(change.auc)]
        if within_pages:
            within = changes(results, auc="group_auc", arm=arm, **kind)
            row.append("" if within is None else mean_cell(within.auc))
        less_control = eta = ratio = ""
        if arm != CONTROL:
            eta = f"{change.eta(teacher):.2f}"
            if CONTROL in by_arm:
                less_control = mean_cell(change.less(by_arm[CONTROL]))
        by_older = changes(results, arm=arm, teacher="strong", **kind)
        if by_older is not None and older is not None:
            ratio = f"{generation_ratio(change, by_older, teacher, older):.2f}"
        calibrations = f"{change.calibration.mean():.3f}"
        rows.append(
            [*row, less_control, calibrations, eta, ratio, ", ".join(change.worse()) or "none"]
        )
    yield markdown(head, rows)
    yield from _by_vertical({**by_arm, "teacher itself": teacher}, teacher.parts)
    if RECIPE in by_arm and "AH" in by_arm:
        cells = [mean_cell(by_arm[RECIPE].less(by_arm["AH"], figure)) for figure in ("ne", "auc")]
        yield f"\n{RECIPE} less AH, paired by seed: NE {cells[0]}, AUC {cells[1]}.\n"


def _by_vertical(by_arm: Mapping[str, Changes], verticals: Sequence[str]) -> Iterator[str]:
    yield "\nNE by vertical, change in % (* p < 0.05, ** p < 0.01, over seeds):\n\n"
    rows = []
    for arm, change in by_arm.items():
        columns = zip(change.parts, change.ne.T, strict=True)
        cells = {part: f"{ne.mean():+.2f}{_stars(ne)}" for part, ne in columns}
        rows.append([arm, *(cells.get(vertical, "") for vertical in verticals)])
    yield markdown(["arm", *verticals], rows)


def _stars(values: Array) -> str:
    p = p_value(values)
    return " **" if p < 0.01 else " *" if p < 0.05 else ""


def over_sources(
    results: Sequence[Result], field: str, table: Callable[[str, list[Result]], Iterator[str]]
) -> Iterator[str]:
    """Yield a sweep's table for each stream that it was run on."""
    for source in dict.fromkeys(r["source"] for r in results):
        if part := swept(results, source, field):
            yield f"\n{source}; {spread_of(part)}:\n\n"
            yield from table(source, part)


def bias(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 2: calibration and NE by the shift of the teacher's logits."""

    def table(source: str, part: list[Result]) -> Iterator[str]:
        shifts, rows = sorted({r["shift"] for r in part}), []
        for arm in arms_of(part):
            by_shift = [changes(part, arm=arm, shift=shift) for shift in shifts]
            if all(by_shift):
                ratios = [calibrations(part, arm, shift).mean() for shift in shifts]
                pairs = zip(ratios, by_shift, strict=True)
                rows.append([arm, *(f"{r:.3f}, {c.ne.mean():+.2f} %" for r, c in pairs if c)])
        yield markdown(["arm", *(f"{shift:+g}" for shift in shifts)], rows)

    yield (
        "\n## 2. Bias\n\nThe teacher's logits are shifted by a constant. In each cell: the serving "
        "calibration over that of the student without a teacher, and the change of NE.\n"
    )
    yield from over_sources(results, "shift", table)


def calibrations(results: Sequence[Result], arm: str, shift: float) -> Array:
    """Return an arm's calibration over none's, of each vertical and seed."""
    none = {(r["vertical"], r["seed"]): r["calibration"] for r in pick(results, arm="none")}
    shifted = pick(results, arm=arm, shift=shift)
    ids = ((r, (r["vertical"], r["seed"])) for r in shifted)
    return np.array([r["calibration"] / none[cell] for r, cell in ids if cell in none])


def freshness(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 3: the change of NE by how late the teacher is."""

    def table(source: str, part: list[Result]) -> Iterator[str]:
        feeds, rows, by_arm = feeds_of(part), [], {}
        for arm in ["teacher", *arms_of(part)]:
            by_feed = [changes(part, arm=arm, feed=feed) for feed in feeds]
            if all(by_feed):
                by_arm[arm] = [change for change in by_feed if change]
                rows.append([arm, *(f"{c.ne.mean():+.2f} %" for c in by_arm[arm])])
        for arm in ("AH + SA", RECIPE):
            if arm in by_arm and "AH" in by_arm:
                pairs = zip(by_arm[arm], by_arm["AH"], strict=True)
                rows.append([f"{arm} less AH", *(mean_cell(c.less(ah)) for c, ah in pairs)])
        yield markdown(["arm", *feeds], rows)

    yield (
        "\n## 3. Freshness\n\nThe teacher is refreshed every week (EB-NeRD: every hour), and "
        "late. *delay-D*: D weeks (hours) later than possible. *frozen*: not refreshed after week "
        "16 (day 4). Cells are changes of NE. The last rows are the difference of an arm to AH "
        "alone, with the paired test.\n"
    )
    yield from over_sources(results, "feed", table)


def feeds_of(results: Sequence[Result]) -> list[str]:
    """Return how old the teacher was in the results, the youngest first."""
    feeds = {r["feed"] for r in results} - {"fresh", "frozen"}
    order = sorted(feeds, key=lambda feed: int(feed.removeprefix("delay-")))
    return [*order, *(["frozen"] if any(r["feed"] == "frozen" for r in results) else [])]


def adapters(results: Sequence[Result], variants: Iterable[str]) -> Iterator[str]:
    """Yield the recipe's variants against AH, with the oldest teacher."""
    part, usual = swept(results, "promotions", "feed"), PLAIN["adapter"]
    ah = changes(part, arm="AH", feed="frozen")
    if ah is None:
        return
    kinds: dict[str, dict[str, Any]] = {arm: {"arm": arm} for arm in (RECIPE, *variants)}
    for rate, width in sorted({tuple(r["adapter"]) for r in part} - {tuple(usual)}):
        kinds[f"adapter's rate {rate:g}, width {width}"] = {"arm": RECIPE, "adapter": [rate, width]}
    yield (
        "\nVariants of the recipe show what the adapter's term needs. Promotions, with the frozen "
        "teacher; each less AH alone. The recipe's margin is 0.25, its weights are 1, the "
        f"adapter's rate is {usual[0]:g} and its width {usual[1]}.\n\n"
    )
    by_variant = {name: changes(part, feed="frozen", **kind) for name, kind in kinds.items()}
    rows = [[name, mean_cell(c.less(ah))] for name, c in by_variant.items() if c is not None]
    yield markdown(["variant", "NE less AH's"], rows)


def scale(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 4: the change of NE by the width of the teacher's tables."""
    part = swept(results, "promotions", "width")
    widths = sorted({r["width"] for r in part})
    if len(widths) < 2:
        return
    yield (
        "\n## 4. Scale of the teacher\n\nColumns are the width of the teacher's tables, which hold "
        f"nearly all of its parameters. Cells are changes of NE. Promotions, {spread_of(part)}.\n\n"
    )
    rows, teacher = [], [changes(part, arm="teacher", width=width) for width in widths]
    for arm in ("teacher", "AH", RECIPE):
        by_width = [changes(part, arm=arm, width=width) for width in widths]
        rows.append([arm, *(mean_cell(c.ne) for c in by_width if c)])
        if arm != "teacher":
            etas = [f"{c.eta(t):.3f}" for c, t in zip(by_width, teacher, strict=True) if c and t]
            rows.append([f"{arm}, η", *etas])
    yield markdown(["", *map(str, widths)], rows)
    for arm in ("AH", RECIPE):
        new, old = (changes(part, arm=arm, width=width) for width in (widths[-1], widths[0]))
        if new and old and teacher[0] and teacher[-1]:
            ratio = generation_ratio(new, old, teacher[-1], teacher[0])
            yield f"\nGeneration ratio from {widths[0]} to {widths[-1]} wide, {arm}: {ratio:.2f}.\n"


def sampling(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 5: calibration where the student trains on a part of the negatives."""
    part = swept(results, "promotions", "kept")
    if not part:
        return
    share = min(r["kept"] for r in part)
    yield (
        f"\n## 5. Sampling\n\nThe student trains on {share:.0%} of the stream's negatives, and "
        "the teacher on all of them. The stream itself holds about one negative in a hundred. "
        "Calibration is to the stream, and to all promoted pairs. It is of the logits as they are "
        "(raw), and after the correction z + log r. The rate r is the share of negatives that was "
        "kept: of the stream's, or of those of the example's basket. *Told*: the library knows the "
        "student's rate, and moves the teacher's logits to it. Promotions, "
        f"{spread_of(part)}.\n\n"
    )
    rows = []
    for arm, corrected in itertools.product(["none", *arms_of(part)], (False, True)):
        cells = pick(part, arm=arm, kept=share, corrected=corrected)
        if not cells:
            continue
        change = changes(part, arm=arm, kept=share, corrected=corrected)
        figures = np.mean([[*r["unsampled"]["stream"], *r["unsampled"]["pairs"]] for r in cells], 0)
        name = arm if arm == "none" else f"{arm}, {'told' if corrected else 'not told'}"
        ne = mean_cell(change.ne) if change and arm != "none" else ""
        rows.append([name, ne, *(f"{figure:.3g}" for figure in figures)])
    head = ["arm", "NE", "to the stream, raw", "corrected", "to all pairs, raw", "corrected"]
    yield markdown(head, rows)


def mechanisms(results: Sequence[Result], arms: Iterable[str]) -> Iterator[str]:
    """Yield table 7: what ExFM's successors do, against AH of the same seeds."""
    yield (
        "\n## 7. What successors do otherwise\n\nNE less AH's, paired by seed.\n\n"
        "* *AH + label*: the auxiliary head learns the mean of the teacher's probability and the "
        "label, at weight 2 (Rec-Distill's auxiliary tower).\n"
        "* *AH + serving head*: the teacher is distilled into both.\n"
        "* *alpha 5, w 10, beta 20*: the settings that a digest of the paper gives.\n"
        "* *Unlabelled rows*: for each example there is one of another vertical, without its "
        "label. A step has as many labels as before.\n"
        "* *Late*: the student starts in week 14 (day 4). It starts without or with the teacher's "
        "tables of that time, projected (CrossAdapt). Its figures are NE against the late student "
        "alone.\n\n"
    )
    kinds = kinds_of(results)
    rows = []
    for arm in (CONTROL, *arms):
        if arm == "none, late":
            continue
        row = [arm]
        for source, student in kinds:
            kind = {"source": source, "student": student}
            change, ah = (changes(results, arm=name, **kind) for name in (arm, "AH"))
            cell = ""
            if change is not None and ah is not None:
                cell = mean_cell(change.ne if ", late" in arm else change.less(ah))
            row.append(cell)
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
    """Yield table 8: a model between the teacher and its students, and a teacher of noise."""
    domain = [r for r in results if r["teacher"] == "domain"]
    if not domain:
        return
    yield (
        "\n## 8. A hierarchy, and a teacher of noise\n\nPromotions. The domain model has the "
        "strong student's features and the teacher's network. It goes through the examples of all "
        "seven departments. The teacher teaches it (AH), and it teaches the students. *Noise*: a "
        "second teacher whose logits are random. Cells are changes of NE. *Less the teacher "
        "alone*: less the same arm (AH, or the recipe) by the teacher alone, paired by seed.\n\n"
    )
    cells = {(r["vertical"], r["seed"]) for r in domain}
    part = [r for r in results if (r["vertical"], r["seed"]) in cells]
    rows = []
    for teacher, arm in itertools.product(TAUGHT_BY, ("teacher", "AH", RECIPE, *arms)):
        row = [f"{TAUGHT_BY[teacher]}, {'itself' if arm == 'teacher' else arm}"]
        for student in STUDENTS:
            kind = {"source": "promotions", "student": student}
            change = changes(part, arm=arm, teacher=teacher, **kind)
            single = "AH" if arm.startswith("AH of") else arm
            single = RECIPE if arm.startswith("recipe") else single
            alone = changes(part, arm=single, **kind)
            less = mean_cell(change.less(alone)) if change and alone and teacher != "rich" else ""
            row += [mean_cell(change.ne) if change else "", less]
        if any(row[1:]):
            rows.append(row)
    head = [
        f"{student}{suffix}" for student in STUDENTS for suffix in ("", ", less the teacher alone")
    ]
    yield markdown(["taught by, arm", *head], rows)


def what_decides(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 9: the gain of each vertical against the lead of its teacher."""
    yield (
        "\n## 9. What decides\n\nThe teacher's lead in each vertical, and what arms bring there "
        "(changes of NE in %, means over seeds).\n\n"
    )
    points, rows = gains_by_lead(results), []
    for source, student in kinds_of(results):
        part = [p for p in points if (p["source"], p["student"]) == (source, student)]
        if part:
            lead, ah, recipe = _columns(part)
            cells = map(_median, (-lead, ah / lead, recipe / lead))
            rows.append([f"{source}, {student}", *cells, f"{np.mean(recipe - ah):+.2f}"])
    head = ["median (range)", "the teacher's lead", "η of AH", "η of the recipe", "recipe less AH"]
    yield markdown(head, rows)
    if len(points) < 3:
        return
    yield _correlations(points)
    lead, ah, recipe = _columns(points)
    rows = []
    for low, high in itertools.pairwise(LEADS):
        at = (-lead >= low) & (-lead < high)
        if at.any():
            cells = map(_median, (-ah[at], ah[at] / lead[at], -recipe[at], recipe[at] / lead[at]))
            less = (recipe - ah)[at].mean()
            rows.append([f"{low} to {high} % ({at.sum()})", *cells, f"{less:+.2f}"])
    head = ["lead (how many)", "gain of AH, %", "η of AH", "gain of the recipe, %"]
    yield markdown([*head, "η of the recipe", "recipe less AH, mean"], rows)


def _columns(points: Sequence[Mapping[str, Any]]) -> tuple[Array, Array, Array]:
    """Return the changes of NE by the teacher, by AH and by the recipe."""
    lead, ah, recipe = (np.array([p[name] for p in points]) for name in ("lead", "AH", RECIPE))
    return lead, ah, recipe


def _median(values: Array) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def _correlations(points: Sequence[Mapping[str, Any]]) -> str:
    lead, ah, recipe = _columns(points)
    leads = -lead >= LEADS[0]
    examples, strong = (
        np.array(column)[leads]
        for column in ([p["rows"] for p in points], [p["student"] == "strong" for p in points])
    )
    eta = (ah / lead)[leads]
    low, middle, high = np.percentile(eta, [10, 50, 90])
    tests = {
        "the lead and the recipe's gain": (-lead, -recipe),
        "the lead and what the recipe brings beyond AH": (-lead, ah - recipe),
        "the number of examples and AH's η": (examples, eta),
        "being the strong student and AH's η": (strong, eta),
    }
    lines = [
        f"* {name}: {test.statistic:.2f} (p {p_text(test.pvalue)})\n"
        for name, pair in tests.items()
        for test in [stats.spearmanr(*pair)]
    ]
    return (
        f"\nRank correlations over these {len(points)} verticals and students, η where the teacher "
        f"leads by {LEADS[0]} % or more:\n\n{''.join(lines)}\nAH's η: 10th percentile {low:.2f}, "
        f"median {middle:.2f}, 90th {high:.2f}. By the lead, medians and ranges:\n\n"
    )


def gains_by_lead(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the changes of NE by the teacher and by arms, for each student of a vertical."""
    points = []
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        by_arm = [changes(results, arm=arm, **kind) for arm in ("teacher", "AH", RECIPE)]
        if not all(by_arm):
            continue
        means = [dict(zip(c.parts, c.ne.mean(0), strict=True)) for c in by_arm if c]
        for vertical in means[0]:
            if all(vertical in by_vertical for by_vertical in means):
                lead, ah, recipe = (by_vertical[vertical] for by_vertical in means)
                none = pick(results, arm="none", **kind, vertical=vertical)
                rows = np.mean([r["rows"] for r in none])
                points.append({**kind, "lead": lead, "AH": ah, RECIPE: recipe, "rows": rows})
    return points


def batches(results: Sequence[Result]) -> Iterator[str]:
    """Yield the table of other batch sizes and rates."""
    others = {json.dumps(r["rates"]): r["rates"] for r in results if r["rates"]}
    if not others:
        return
    yield (
        "\n## Other settings of the student\n\nPromotions. Settings that are better for the "
        "student than those above: smaller batches, which take longer, and other rates.\n\n"
    )
    rows = []
    for rates, arm, student in itertools.product(others.values(), ("AH", RECIPE), STUDENTS):
        kind = {"source": "promotions", "student": student, "rates": rates, "arm": arm}
        change = changes(results, **kind)
        if change is not None:
            name = f"{rates[0]}, {rates[1]:g}, {rates[2]:g}"
            counts = f"{len(change.parts)}, {len(change.seeds)}"
            rows.append([name, student, arm, mean_cell(change.ne), mean_cell(change.auc), counts])
    yield markdown(
        ["batch, rate, of tables", "student", "arm", "NE", "AUC", "verticals, seeds"], rows
    )


def merged(
    stored: Mapping[str, Any],
    new: Sequence[Result],
    planned: Mapping[Any, str],
    environment: Mapping[str, Any],
) -> str:
    """Return the stored results with the new ones, as JSON with a line for each result.

    Args:
        stored: the content of the file, or nothing.
        new: results of cells.
        planned: the cells of all tables, with their keys. A stored result of one of them under
            another key is of other settings, and is dropped.
        environment: of the new ones.
    """
    keys = {cell_of(asdict(cell)): key for cell, key in planned.items()}
    results = {
        cell_of(r): r
        for r in stored.get("results", ())
        if keys.get(cell_of(r), r["key"]) == r["key"]
    }
    environments = list(stored.get("environments", ()))
    fresh = [r for r in new if cell_of(r) not in results]
    for result in fresh:
        results[cell_of(result)] = {**_short(result), "run": len(environments)}
    head = {
        "missing": len(keys.keys() - results.keys()),
        "environments": environments + [environment] * bool(fresh),
    }
    lines = ",\n".join(map(json.dumps, results.values()))
    return f'{json.dumps(head)[:-1]},\n"results": [\n{lines}\n]}}\n'


def cell_of(result: Result) -> str:
    """Return all that tells a cell from others, as text."""
    return json.dumps([{**PLAIN, **result}[name] for name in CELL])


def _short(result: Result) -> dict[str, Any]:
    """Drop what no table shows and what a plain cell has; six digits are kept."""
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

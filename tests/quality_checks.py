"""Checks of the quality benchmark, in a process of its own, as its modules share names with tests'.

    python tests/quality_checks.py

A tiny stream of five weeks stands for the real ones.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import numpy as np
import passes
import quality
import quality_report
import ranking
import remembered
import sources
import torch
from sources import data

from torchrec_exfm import DistillationTerm
from torchrec_exfm.losses import cosine_of_embeddings, listwise
from torchrec_exfm.study import Arm, Study, run, run_pass

WEEKS, WEEKLY, BATCH = 5, 90, 32
FEATURES = (("household", "product"), ("hour_sin", "hour_cos"))
RATES = (BATCH, 1e-2, 0.3)


def tiny_stream() -> data.Stream:
    rng = np.random.default_rng(0)
    rows = WEEKS * WEEKLY
    ids = {name: rng.integers(0, 20, rows).astype(np.int32) for name in FEATURES[0]}
    return data.Stream(
        time=np.arange(rows, dtype=np.int64) * 3600,
        week=np.repeat(np.arange(1, WEEKS + 1, dtype=np.int32), WEEKLY),
        label=((ids["product"] % 3 == 0) & (rng.random(rows) < 0.8)).astype(np.float32),
        vertical=np.zeros(rows, np.int32),
        weight=np.full(rows, 7, np.float32),
        example_id=np.arange(rows, dtype=np.int64),
        sparse=ids,
        dense={name: rng.random(rows).astype(np.float32) for name in FEATURES[1]},
        verticals=("all",),
        cardinalities=dict.fromkeys(FEATURES[0], 20),
    )


def teach(stream: data.Stream, **options: Any) -> dict[str, np.ndarray]:
    settings = {"seed": 1, "width": 4, "delays": (0, 2), "frozen_after": 2, **options}
    return passes.teacher_logits(stream, FEATURES, (BATCH, 1e-3, 0.3), **settings)


def student(
    stream: data.Stream, *terms: DistillationTerm, by: str = "teacher", **options: Any
) -> np.ndarray:
    """The logits before each update, NaN in the rest that makes no batch."""
    study = passes.study_of(stream, FEATURES, RATES, **options)
    said = run_pass(study, Arm(terms, by), seed=3)
    logits = np.full(len(stream), np.nan, np.float32)
    logits[: len(said.logits)] = said.logits[:, 0]
    return logits


def flipped_from(stream: data.Stream, week: int) -> data.Stream:
    label = np.where(stream.week >= week, 1 - stream.label, stream.label)
    return replace(stream, label=label.astype(np.float32))


def same(mine: np.ndarray, other: np.ndarray, week: int) -> bool:
    rows = slice((week - 1) * WEEKLY, week * WEEKLY)
    return np.array_equal(mine[rows], other[rows], equal_nan=True)


def check_a_teachers_age() -> None:
    """A snapshot of a week's end knows all labels through that week, and none of a later one."""
    stream = tiny_stream()
    said = teach(stream)
    assert set(said) == {"fresh", "delay-0", "delay-2", "frozen"}
    first_scored = {"delay-0": 2, "delay-2": 4, "frozen": 3}
    for feed, first in first_scored.items():
        scored = ~np.isnan(said[feed])
        assert np.array_equal(scored, stream.week >= first), feed
    for week in range(2, WEEKS + 1):
        other = teach(flipped_from(stream, week))
        assert same(said["delay-0"], other["delay-0"], week)
        assert week == WEEKS or not same(said["delay-0"], other["delay-0"], week + 1)
        if 4 <= week + 2 <= WEEKS:
            assert same(said["delay-2"], other["delay-2"], week + 2)
        assert (week > 2) == same(said["frozen"], other["frozen"], WEEKS)
    no_snapshots = teach(stream, delays=(), frozen_after=None)
    assert np.array_equal(no_snapshots["fresh"], said["fresh"], equal_nan=True)
    part = teach(stream, scored=stream.label == 1)["delay-0"]
    expected = np.where(stream.label == 1, said["delay-0"], np.nan)
    # in other batches: float32 rounds the sums of order 1 that a logit near 0 is the rest of
    np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)


def check_directions_are_fitted_on_the_past() -> None:
    """A teacher's last hidden layer, seen before the update, along directions of earlier weeks."""
    stream = tiny_stream()
    wanted = stream.label == 1
    seen: list[torch.Tensor] = []
    plain = passes.Hidden.take
    options = {"delays": (0,), "frozen_after": None, "scored": wanted, "kept_before": 3}

    def take(hidden: passes.Hidden, rows: slice) -> None:
        seen.append(torch.cat(hidden._taken))
        plain(hidden, rows)

    with mock.patch.object(passes.Hidden, "take", take):
        said = teach(stream, **options)
    assert np.array_equal(said["fresh"], teach(stream)["fresh"], equal_nan=True)
    layer, first = torch.cat(seen).double().numpy(), 2 * WEEKLY // BATCH * BATCH
    past = layer[:first][wanted[:first]]
    _, vectors = np.linalg.eigh(np.cov(past.T))
    ours = said[passes.TAUGHT]
    there = ~np.isnan(ours[:, 0])
    assert np.array_equal(np.flatnonzero(there), first + np.flatnonzero(wanted[first : len(layer)]))
    # To be compared without the signs and order that directions are free in: lengths and angles
    top = (layer[there[: len(layer)]] - past.mean(0)) @ vectors[:, -passes.DIRECTIONS :]
    np.testing.assert_allclose(ours[there] @ ours[there].T, top @ top.T, rtol=1e-3, atol=1e-4)
    changed = teach(flipped_from(stream, 3), **options)[passes.TAUGHT]
    assert np.array_equal(changed[: first + BATCH], ours[: first + BATCH], equal_nan=True)
    assert not np.array_equal(changed, ours, equal_nan=True)


def check_a_student_is_taught_groups_and_directions() -> None:
    """Groups are those of the stream; a missing direction is left out."""
    stream = tiny_stream()
    teacher = stream.dense["hour_sin"]
    embeddings = np.random.default_rng(5).normal(size=(len(stream), 4)).astype(np.float32)

    options: dict[str, Any] = {"teacher": teacher}
    term = DistillationTerm(loss=listwise(calibrated=True))
    alone = replace(stream, example_id=np.arange(len(stream)) << 25)
    together = replace(stream, example_id=(np.arange(len(stream)) // 6) << 25)
    free = student(alone, replace(term, weight=0.0), **options)
    assert np.array_equal(
        student(alone, term, **options), free, equal_nan=True
    )  # a list of one says nothing
    assert not np.array_equal(student(together, term, **options), free, equal_nan=True)

    term = DistillationTerm(loss=cosine_of_embeddings(4), hidden=())
    missing = np.full_like(embeddings, np.nan)
    options["embeddings"] = embeddings
    free = student(stream, replace(term, weight=0.0), **options)
    assert np.array_equal(
        student(stream, term, **{**options, "embeddings": missing}), free, equal_nan=True
    )
    assert not np.array_equal(student(stream, term, **options), free, equal_nan=True)


def check_figures_within_groups() -> None:
    """Against every pair, and every order of what is tied."""
    rng = np.random.default_rng(4)
    for size, levels in ((1, 1), (60, 3), (60, 8), (60, 10**6)):
        groups, logits = rng.integers(0, 12, size), rng.integers(0, levels, size) / 2 - 1
        labels = (rng.random(size) < 0.4).astype(np.float32)
        found = ranking.group_figures(logits, labels, groups)
        expected = brute_force(logits.tolist(), labels.tolist(), groups.tolist())
        assert found["groups"] == len(expected)
        if expected:
            mean = np.mean(expected, 0)
            np.testing.assert_allclose([found["group_auc"], found["ndcg"]], mean, rtol=1e-12)
    assert found["groups"] > 5
    nothing = ranking.group_figures(np.zeros(0), np.zeros(0), np.zeros(0, int))
    assert nothing["groups"] == 0 and math.isnan(nothing["ndcg"])


def orders(rows: list[int], logits: list[float]) -> Iterator[list[int]]:
    """All that have the larger logits first: every order of each block that is tied."""
    levels = sorted({logits[i] for i in rows}, reverse=True)
    blocks = [[i for i in rows if logits[i] == level] for level in levels]
    for parts in itertools.product(*map(itertools.permutations, blocks)):
        yield list(itertools.chain(*parts))


def brute_force(
    logits: list[float], labels: list[float], groups: list[int]
) -> list[tuple[float, float]]:
    """AUC and NDCG@5 of each group with both labels."""
    figures = []
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        good, bad = ([i for i in rows if labels[i] == y] for y in (1, 0))
        if not good or not bad:
            continue
        pairs = [(logits[i], logits[j]) for i in good for j in bad]
        auc = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs)
        gains = [
            sum(labels[i] / math.log2(2 + at) for at, i in enumerate(order[:5]))
            for order in orders(rows, logits)
        ]
        ideal = sum(1 / math.log2(2 + at) for at in range(min(5, len(good))))
        figures.append((auc, sum(gains) / len(gains) / ideal))
    return figures


def check_a_student_scores_before_it_trains() -> None:
    stream, term = tiny_stream(), DistillationTerm()
    teacher = np.full(len(stream), 0.5, np.float32)
    plain, taught = student(stream), student(stream, term, teacher=teacher)
    last = len(stream) // BATCH * BATCH
    assert np.isnan(plain[last:]).all() and not np.isnan(plain[:last]).any()
    changed = flipped_from(stream, 3)
    first = 2 * WEEKLY // BATCH * BATCH  # of the first batch with another label
    for terms in ((), (term,)):
        mine, other = (student(s, *terms, teacher=teacher) for s in (stream, changed))
        assert np.array_equal(mine[: first + BATCH], other[: first + BATCH])
        assert not np.array_equal(mine[first + BATCH : last], other[first + BATCH : last])
    free = student(stream, replace(term, weight=0.0), teacher=teacher)
    assert np.array_equal(plain, free, equal_nan=True)
    assert not np.array_equal(plain, taught, equal_nan=True)


def check_unlabelled_rows_teach_the_head_alone() -> None:
    """Rows without a label change nothing without a term, but for the batches' borders."""
    stream, term = tiny_stream(), DistillationTerm()
    said = np.where(stream.label == 1, 1.0, -1.0).astype(np.float32)
    missing = np.arange(len(stream)) % 2 == 1
    part = replace(stream, label=np.where(missing, np.nan, stream.label).astype(np.float32))
    whole = student(part, term, teacher=said)
    without = np.where(missing, np.nan, said).astype(np.float32)
    fewer = student(part, term, teacher=without)
    assert not np.array_equal(whole, fewer, equal_nan=True)
    batch = {"part": part, "labelled": stream.select(~missing)}
    alone = {
        name: passes.study_of(s, FEATURES, (BATCH // (1 + (name == "labelled")), 1e-2, 0.3))
        for name, s in batch.items()
    }
    logits = {name: run_pass(study, Arm(), seed=3).logits[:, 0] for name, study in alone.items()}
    labelled = logits["part"][~missing[: len(logits["part"])]]
    np.testing.assert_allclose(labelled, logits["labelled"][: len(labelled)], rtol=1e-4, atol=1e-5)


def check_tables_are_brought_to_the_students_width() -> None:
    """Distances of a narrower teacher's rows are kept, up to the scale of the student's start."""
    stream = tiny_stream()
    rng = np.random.default_rng(8)
    for width in (4, 48):
        taught = {name: rng.normal(3, 2, (20, width)).astype(np.float32) for name in FEATURES[0]}
        study = passes.study_of(stream, FEATURES, RATES, taught_tables=taught)
        model, _ = study.distribute(study.make_student())
        for name, table in passes.tables(model).items():
            values = table.numpy()
            assert values.shape == (20, passes.demo.STUDENT["width"])
            if width == 4:
                ratio = np.linalg.norm(values[1:] - values[:-1], axis=1) / np.linalg.norm(
                    taught[name][1:] - taught[name][:-1], axis=1
                )
                np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
            assert values.std() < 0.5  # the student's own are within 1 / sqrt(20)


def check_a_mixed_target_is_the_mean() -> None:
    logits, labels = np.array([[0.0], [2.0]], np.float32), np.array([1.0, 0.0], np.float32)
    p = 1 / (1 + np.exp(-quality.mixed(logits, labels)[:, 0].astype(np.float64)))
    np.testing.assert_allclose(p, [0.75, 0.5 / (1 + np.exp(-2.0))], rtol=1e-6)


@contextmanager
def tiny_source() -> Iterator[Path]:
    """The tiny stream in the place of one that is downloaded, and a folder for what is run."""
    stream = tiny_stream()
    halves = replace(
        stream, vertical=(np.arange(len(stream)) % 2).astype(np.int32), verticals=("even", "odd")
    )
    source = sources.Source(
        load=lambda: halves,
        verticals=halves.verticals,
        swept=halves.verticals,
        lean=FEATURES,
        strong=FEATURES,
        rich=FEATURES,
        rates={"lean": RATES, "strong": RATES},
        teacher_rates=(BATCH, 1e-2, 0.3),
        tuning_week=2,
        first_week=3,
        memory_keys=(("household",), ("product",), ("household", "product")),
    )
    with mock.patch.dict(sources.SOURCES, tiny=source), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
    for cached in (sources.stream_of, sources.source_of, sources.rows_of, sources.sampling_rates):
        cached.cache_clear()


def check_a_stream_tells_verticals_and_weeks_where_nobody_did() -> None:
    with tiny_source():
        told = replace(sources.SOURCES["tiny"], verticals=(), swept=())
        with mock.patch.dict(sources.SOURCES, tiny=told):
            source = sources.source_of("tiny")
            assert source.verticals == source.swept == ("even", "odd")
            assert (source.tuning_week, source.first_week) == (2, 3)
            cells = list(quality.ablation("tiny", quick=False))
            assert {cell.arm for cell in cells} == {"teacher", *quality.FEWER}


def check_a_study_is_the_same_as_a_cell() -> None:
    """The command's table has the figures of the benchmark, for the arms that both have."""
    with tiny_source() as folder:
        cell = quality.Cell("tiny", "odd", "lean", "AH", 0)
        teacher = next(iter(quality.feeds_for(cell)))
        quality.teach(teacher, {"fresh"}, folder)
        study, _, _ = quality.study_of(cell, folder)
        arms = {name: quality.ARMS[name] for name in ("none", "head on the label", "AH")}
        run(replace(study, arms=arms), seeds=1, folder=folder / "study")
        results = quality.json.loads((folder / "study" / "table.json").read_text())
        for name in (*arms, "teacher"):
            one = replace(cell, arm=name)
            quality.run(one, folder)
            mine = quality.json.loads(quality.cell_file(folder, one).read_text())
            told = "the teacher itself" if name == "teacher" else name
            (theirs,) = (r for r in results if r["arm"] == told)
            for figure in ("rows", "ne", "auc", "calibration"):
                assert mine[figure] == theirs[figure], (name, figure)
        assert isinstance(study, Study)


def check_every_kind_of_cell_runs() -> None:
    """A model between, noise, tables, unlabelled rows: all that a tiny stream can show."""
    with tiny_source() as folder:
        cells = [
            quality.Cell("tiny", "odd", "lean", arm, 0, teacher=teacher)
            for teacher, arm in (
                *(("rich", arm) for arm in quality.MECHANISMS),
                ("strong", "AH"),
                ("domain", "teacher"),
                ("domain alone", "AH"),
                ("rich+domain", "AH of both"),
                ("rich+noise", "recipe, margin alone of the second"),
            )
        ]
        needed: dict[quality.Teacher, set[str]] = {}
        for cell in cells:
            for teacher, feeds in quality.feeds_for(cell).items():
                needed.setdefault(teacher, set()).update(feeds)
        for teacher in sorted(needed, key=lambda t: t.kind.startswith("domain")):
            quality.teach(teacher, needed[teacher], folder)
        found = {}
        for cell in cells:
            quality.run(cell, folder)
            told = quality.json.loads(quality.cell_file(folder, cell).read_text())
            assert 0 < told["ne"] < 5 and told["rows"] > 50, cell
            found[cell.teacher, cell.arm] = told["ne"]
        # Here all examples are the domain's, so that a model which nobody taught is a teacher.
        assert found.pop(("domain alone", "AH")) == found["strong", "AH"]
        assert len(set(found.values())) == len(found)  # each does something of its own


def check_arms_with_memories_run() -> None:
    with tiny_source() as folder:
        cells = [quality.Cell("tiny", "odd", "lean", arm, 0) for arm in quality.MEMORY]
        (teacher,) = {t for cell in cells for t in quality.feeds_for(cell)}
        quality.teach(teacher, {"fresh", passes.TAUGHT}, folder)
        by_arm = {}
        for cell in cells:
            quality.run(cell, folder)
            told = quality.json.loads(quality.cell_file(folder, cell).read_text())
            by_arm[cell.arm] = told["ne"]
        assert all(0 < ne < 5 for ne in by_arm.values())
        assert len({*by_arm.values()}) == len(by_arm)  # each does something of its own


def check_memories_are_of_the_past() -> None:
    """Aggregates by a dict of lists; what comes with or after an example changes nothing of it."""
    with tiny_source():
        source, stream = sources.source_of("tiny"), sources.stream_of("tiny")
        stream = replace(stream, time=stream.time // 7200 * 7200)  # ties in time
        whole = np.ones(len(stream), bool)
        columns = remembered.aggregates(source, stream, whole, None)
        half = len(stream) // 2
        is_late = stream.time >= stream.time[half]
        changed = replace(stream, label=np.where(is_late, 1 - stream.label, stream.label))
        again = remembered.aggregates(source, changed, whole, None)
        until = np.count_nonzero(stream.time <= stream.time[half])
        assert (columns[:until] == again[:until]).all() and (columns != again).any()
        places = remembered.histories(source, stream, whole, whole)
        for row in range(0, len(stream), 7):
            user = stream.sparse["household"]
            earlier = np.flatnonzero((user == user[row]) & (stream.time < stream.time[row]))
            assert places[row][places[row] >= 0].tolist() == earlier[::-1][:50].tolist()
            labels = stream.label[earlier]
            assert columns[row, 0] == (len(earlier) > 0)
            assert np.isclose(columns[row, 1], np.log1p(len(earlier)), rtol=1e-6)
            if len(earlier):
                odds = np.log(labels.sum() + 0.9) - np.log(len(labels) - labels.sum() + 9.1)
                assert np.isclose(columns[row, 3], odds, rtol=1e-5, atol=1e-6)
                assert columns[row, 4] == labels[-1]


def check_a_correction_meets_the_unsampled_rate() -> None:
    """A model that is right about the sampled data is right about all pairs, once corrected."""
    labels = (np.random.default_rng(2).random(250) < 0.3).astype(np.float32)
    rate = labels.mean()
    logits = np.full(len(labels), np.log(rate / (1 - rate)), np.float32)
    for kept in (0.5, np.full(len(labels), 0.5 / 7)):
        raw, corrected = quality.unsampled(logits, labels, kept)
        np.testing.assert_allclose(corrected, 1, rtol=1e-5)
        assert raw > 1.2


def check_a_row_has_the_rate_of_its_basket() -> None:
    """A purchase too: that of the negatives which were drawn with it."""
    stream = tiny_stream()
    rows = np.arange(len(stream))
    baskets = rows // 5
    stream = replace(
        stream,
        label=(rows % 5 == 2).astype(np.float32),
        weight=np.where(rows % 5 == 2, 1, baskets + 2).astype(np.float32),
        example_id=data.example_ids(baskets, rows),
    )
    with mock.patch.object(sources, "stream_of", return_value=stream):
        rates = sources.sampling_rates("promotions")
    sources.sampling_rates.cache_clear()
    np.testing.assert_allclose(rates, 1 / (baskets + 2))


def check_cells_have_keys_of_their_own() -> None:
    with ebnerd_of("one"):
        cells = all_cells(quick=False)
        keys = {cell: cell.key for cell in cells}
        assert len(set(keys.values())) == len(cells)
        assert set(all_cells(quick=True)) <= set(cells)
    with ebnerd_of("another"):  # data are another cell
        assert all((cell.key != keys[cell]) == (cell.source == "ebnerd") for cell in cells)


def all_cells(quick: bool) -> set[quality.Cell]:
    return {
        cell
        for part in quality.PARTS.values()
        for source in ("promotions", "movielens", "ebnerd")
        for cell in part.of(source, quick)
    }


@contextmanager
def ebnerd_of(digest: str) -> Iterator[None]:
    with (
        mock.patch.dict("os.environ", EBNERD="anywhere"),
        mock.patch.object(sources.ebnerd, "digest", return_value=digest),
    ):
        yield


def check_all_that_an_arm_is_of_is_in_the_key() -> None:
    cell = quality.Cell("promotions", "PRODUCE", "lean", "AH", 0)
    keys = {cell.key}
    settings = [
        quality.Setting((DistillationTerm(loss=loss),))
        for loss in (listwise(), listwise(calibrated=True), cosine_of_embeddings(3))
    ]
    settings += [quality.Setting((DistillationTerm(beta=2.0),)), quality.Setting(mixed=True)]
    for setting in settings:
        with mock.patch.dict(quality.SETTINGS, {cell.arm: setting}):
            keys.add(cell.key)
    assert len(keys) == 1 + len(settings)


def check_a_missing_folder_is_told() -> None:
    with mock.patch.dict("os.environ"):
        sources.os.environ.pop("EBNERD", None)
        assert "ebnerd" not in sources.at_hand()
        try:
            sources.data_folder("ebnerd")
        except SystemExit as error:
            assert "SOURCE=ebnerd DATA=FOLDER" in str(error)
        else:
            raise AssertionError("no error")


def made_up(effects: dict[str, float], **cell: Any) -> list[dict[str, Any]]:
    """Results of two verticals and five seeds, in any order."""
    rng, results = np.random.default_rng(3), []
    for seed, (vertical, level), (arm, change) in itertools.product(
        range(5), (("a", 0.5), ("b", 0.8)), effects.items()
    ):
        noise = 0 if arm == "none" else rng.normal(0, 1e-3)
        ids = {"source": "s", "vertical": vertical, "part": vertical, "student": "lean"}
        figures = {"ne": level * (1 + change + noise), "auc": 0.8, "calibration": 1.0}
        figures |= {
            "group_auc": 0.6 * (1 - change - noise),
            "ndcg": 0.5 * (1 - change),
            "groups": 9,
        }
        results.append({**quality_report.PLAIN, **ids, "arm": arm, "seed": seed, **figures, **cell})
    rng.shuffle(results)
    return results


def check_tables() -> None:
    """Changes against none of the same vertical and seed, with the two ratios and the control."""
    control = quality_report.CONTROL
    results = made_up(
        {"none": 0, "AH": -0.02, "serving head": 0.03, "teacher": -0.2, control: -0.01}
    )
    older = made_up({"AH": -0.005, "teacher": -0.1}, teacher="strong")
    text = "".join(quality_report.ablation(results + older))
    row = next(line for line in text.splitlines() if line.startswith("| AH |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert -2.1 < float(cells[1].split()[0]) < -1.9 and -1.1 < float(cells[3].split()[0]) < -0.9
    assert cells[5] == "0.10" and 0.13 <= float(cells[6]) <= 0.17 and cells[7] == "none"
    worse = next(line for line in text.splitlines() if line.startswith("| serving head |"))
    assert "a, b" in worse or "b, a" in worse


def check_the_table_of_ranking() -> None:
    """Tests against the recipe, within groups."""
    effects = {"none": 0.0, "teacher": -0.1, quality_report.RECIPE: -0.01}
    effects |= {"recipe + pairwise": -0.01, "recipe + calibrated listwise": -0.02}
    text = "".join(ranking.table(made_up(effects), list(quality.RANKING)))
    row = next(line for line in text.splitlines() if line.startswith("| recipe + cal"))
    assert 0.8 < float(row.split("|")[3].split()[0]) < 1.2
    assert "Of these 2 differences of AUC within groups 1 are above 0 and 0 below" in text


def check_the_table_of_memory() -> None:
    """Each arm against none, and against its own control."""
    recipe = quality_report.RECIPE
    effects = {"none": 0.0, "teacher": -0.1, "AH": -0.005, recipe: -0.01, "label memory": -0.03}
    effects |= {"label memory + recipe": -0.04, "label and teacher memory + recipe": -0.05}
    text = "".join(remembered.table(made_up(effects)))
    row = next(line for line in text.splitlines() if line.startswith("| label and teacher"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == "0.50" and cells[4].endswith("(label memory + recipe)")
    assert -1.2 < float(cells[4].split()[0]) < -0.8
    assert "The best arm is label and teacher memory + recipe: η 0.50; by logits alone 0.1" in text
    assert not "".join(remembered.table(made_up({"none": 0.0, "AH": -0.01})))


def check_what_is_kept_is_read_again() -> None:
    """What other settings gave goes, what was measured anew comes; the rest stays to the byte."""
    text = quality.KEPT_FILE.read_text()
    kept = quality.json.loads(text)
    cells = [cell for part in quality.PARTS.values() for cell in part.of("promotions", False)]
    keys = {cell: cell.key for cell in cells}
    assert quality_report.merged(kept, [], keys, {"machine": 1}) == text
    changed = {**keys, cells[0]: "another"}
    fewer = quality.json.loads(quality_report.merged(kept, [], changed, {}))
    assert len(fewer["results"]) == len(kept["results"]) - 1 and fewer["missing"] == 1
    anew = {**quality.asdict(cells[0]), "key": "another", "ne": 0.5, "seconds": 1.0}
    again = quality.json.loads(quality_report.merged(kept, [anew], changed, {"machine": 1}))
    assert again["results"][-1]["ne"] == 0.5 and again["missing"] == 0
    assert again["environments"][again["results"][-1]["run"]] == {"machine": 1}


def check_the_page_is_that_of_what_is_kept() -> None:
    page = quality.HERE / "QUALITY.md"
    with tempfile.TemporaryDirectory() as folder:
        quality.show(quality.json.loads(quality.KEPT_FILE.read_text()), Path(folder))
        assert (Path(folder) / "QUALITY.md").read_text() == page.read_text()


def check_a_page_of_one_stream_is_made_too() -> None:
    """As where the others were never run: their tables are left out."""
    kept = quality.json.loads(quality.KEPT_FILE.read_text())
    some = [r for r in kept["results"] if r["source"] == "movielens" and r["seed"] < 2]
    with tempfile.TemporaryDirectory() as folder:
        text = quality.show({**kept, "results": some}, Path(folder))
    assert "### movielens, lean" in text and "## 4. Scale" not in text and "nan" not in text


def check_a_cell_is_kept_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells" / "x.json"
        try:
            quality.write_whole(path, lambda file: 1 / 0)
        except ZeroDivisionError:
            assert not path.exists()
        quality.write_whole(path, lambda file: file.write(b"{}"))
        assert [entry.name for entry in path.parent.iterdir() if entry.suffix == ".json"] == [
            "x.json"
        ]


def main() -> None:
    passes.start()
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

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
import torch
from passes import data
from scipy import stats

from torchrec_exfm import DistillationTerm, ExFMMetrics
from torchrec_exfm.losses import cosine_of_embeddings, listwise

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
    return passes.teacher_logits(stream, FEATURES, **settings)


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
    options = {"delays": (0,), "frozen_after": None, "scored": wanted, "fitted_before": 3}

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

    def student(stream: data.Stream, term: DistillationTerm, **options: Any) -> np.ndarray:
        options = {"seed": 3, "terms": (term,), "teacher": teacher, **options}
        return passes.student_logits(stream, FEATURES, RATES, **options)

    term = DistillationTerm(loss=listwise(calibrated=True))
    alone = replace(stream, example_id=np.arange(len(stream)) << 25)
    together = replace(stream, example_id=(np.arange(len(stream)) // 6) << 25)
    free = student(alone, replace(term, weight=0.0))
    assert np.array_equal(student(alone, term), free, equal_nan=True)  # a list of one says nothing
    assert not np.array_equal(student(together, term), free, equal_nan=True)

    term = DistillationTerm(loss=cosine_of_embeddings(4), hidden=())
    missing = np.full_like(embeddings, np.nan)
    free = student(stream, replace(term, weight=0.0), embeddings=embeddings)
    assert np.array_equal(student(stream, term, embeddings=missing), free, equal_nan=True)
    assert not np.array_equal(student(stream, term, embeddings=embeddings), free, equal_nan=True)


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
            for order in itertools.permutations(rows)
            if all(logits[a] >= logits[b] for a, b in itertools.pairwise(order))
        ]
        ideal = sum(1 / math.log2(2 + at) for at in range(min(5, len(good))))
        figures.append((auc, sum(gains) / len(gains) / ideal))
    return figures


def check_a_student_scores_before_it_trains() -> None:
    stream, terms = tiny_stream(), (DistillationTerm(),)
    teacher = np.full(len(stream), 0.5, np.float32)

    def student(stream: data.Stream, *terms: DistillationTerm) -> np.ndarray:
        return passes.student_logits(stream, FEATURES, RATES, seed=3, terms=terms, teacher=teacher)

    plain, taught = student(stream), student(stream, *terms)
    last = len(stream) // BATCH * BATCH
    assert np.isnan(plain[last:]).all() and not np.isnan(plain[:last]).any()
    changed = flipped_from(stream, 3)
    first = 2 * WEEKLY // BATCH * BATCH  # of the first batch with another label
    for terms_ in ((), terms):
        mine, other = student(stream, *terms_), student(changed, *terms_)
        assert np.array_equal(mine[: first + BATCH], other[: first + BATCH])
        assert not np.array_equal(mine[first + BATCH : last], other[first + BATCH : last])
    assert np.array_equal(plain, student(stream, DistillationTerm(weight=0.0)), equal_nan=True)
    assert not np.array_equal(plain, taught, equal_nan=True)


def check_figures_are_torchrecs() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(-2, 1, 4000).astype(np.float32)
    labels = (rng.random(4000) < passes_sigmoid(logits)).astype(np.float32)
    metrics = ExFMMetrics(batch_size=4000, device=torch.device("cpu"), window_size=4000)
    metrics.update((torch.tensor(0.0), torch.from_numpy(logits), torch.from_numpy(labels)))
    expected, found = metrics.compute(), quality.figures(logits, labels)
    for name in ("ne", "auc", "calibration"):
        np.testing.assert_allclose(found[name], expected[f"{name}/label"], rtol=1e-5)
    weeks = quality.by_week(logits, labels, np.repeat([1, 2], 2000))
    rate = labels.mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    np.testing.assert_allclose(
        np.mean([week[2] for week in weeks]) / entropy, found["ne"], rtol=1e-6
    )


def check_ties_count_half() -> None:
    labels = np.array([0, 1, 0, 1])
    assert quality_report.auc(np.array([1.0, 1.0, 1.0, 1.0]), labels) == 0.5
    assert quality_report.auc(np.array([30.0, 31.0, 29.0, 40.0]), labels) == 1.0


def passes_sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z.astype(np.float64)))


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
    with mock.patch.object(passes, "stream_of", return_value=stream):
        rates = passes.sampling_rates("promotions")
    passes.sampling_rates.cache_clear()
    np.testing.assert_allclose(rates, 1 / (baskets + 2))


def check_cells_have_names_of_their_own() -> None:
    with ebnerd_of("one"):
        cells = all_cells(quick=False)
        names = {cell: cell.name for cell in cells}
        assert len(set(names.values())) == len(cells)
        assert set(all_cells(quick=True)) <= set(cells)
    with ebnerd_of("another"):  # data are another cell
        assert all((cell.name != names[cell]) == (cell.source == "ebnerd") for cell in cells)


def all_cells(quick: bool) -> set[quality.Cell]:
    parts = [*quality.groups(quick), quality.ranking(quick)]
    return {cell for part in parts for cell in part}


@contextmanager
def ebnerd_of(digest: str) -> Iterator[None]:
    with (
        mock.patch.dict("os.environ", EBNERD="anywhere"),
        mock.patch.object(passes.ebnerd, "digest", return_value=digest),
    ):
        yield


def check_the_losses_of_a_term_are_in_the_name() -> None:
    cell = quality.Cell("promotions", "PRODUCE", "lean", "recipe + pairwise", 0)
    names = {cell.name}
    for loss in (listwise(), listwise(calibrated=True), cosine_of_embeddings(3)):
        arms = {cell.arm: (DistillationTerm(loss=loss),)}
        with mock.patch.dict(quality.RANKING_ARMS, arms):
            names.add(cell.name)
    assert len(names) == 4


def check_a_missing_folder_is_told() -> None:
    with mock.patch.dict("os.environ"):
        passes.os.environ.pop("EBNERD", None)
        try:
            passes.ebnerd_folder()
        except SystemExit as error:
            assert "--ebnerd FOLDER" in str(error)
        else:
            raise AssertionError("no error")


def check_tables() -> None:
    """Changes against none of the same vertical and seed, with the test over seeds."""
    results = []
    rng = np.random.default_rng(3)
    effect = {"none": 0.0, "AH": -0.02, "serving head": 0.03, "teacher": -0.2}
    for seed in range(5):
        for vertical, level in (("a", 0.5), ("b", 0.8)):
            for arm, change in effect.items():
                noise = 0 if arm == "none" else rng.normal(0, 1e-3)
                results.append(
                    {
                        **{"source": "s", "vertical": vertical, "student": "lean", "arm": arm},
                        **{"seed": seed, "feed": "fresh", "width": 16, "shift": 0.0, "kept": 1.0},
                        **{"adapter": [1e-2, 32]},
                        **{"corrected": False, "rates": None, "ne": level * (1 + change + noise)},
                        **{"auc": 0.8, "calibration": 1.0},
                    }
                )
    rng.shuffle(results)
    change = quality_report.changes(results, source="s", student="lean", arm="AH")
    assert change is not None and change.ne.shape == (5, 2)
    assert abs(change.ne.mean() + 2) < 0.2 and quality_report.worse(change) == []
    expected = stats.ttest_rel([0.1, 0.2, 0.4], [0.0, 0.1, 0.1]).pvalue
    assert np.isclose(quality_report.p_value(np.array([0.1, 0.1, 0.3])), expected)
    serving = quality_report.changes(results, source="s", student="lean", arm="serving head")
    assert serving is not None and sorted(quality_report.worse(serving)) == ["a", "b"]
    text = "".join(quality_report.ablation(results, "AH"))
    assert "| AH | -2.0" in text or "| AH | -1.9" in text
    assert ("a, b" in text or "b, a" in text) and "0.10" in text  # the transfer ratio, 2 of 20


def check_the_table_of_ranking() -> None:
    """Changes against none, tests against the recipe, and whether the aim is met."""
    rng, results = np.random.default_rng(6), []
    effect = {"none": 0.0, "teacher": 0.1, "R": 0.01, "recipe + pairwise": 0.01}
    for arm, gain in {**effect, "recipe + calibrated listwise": 0.02}.items():
        for seed, vertical in itertools.product(range(5), "ab"):
            level = 1 + gain + (arm != "none") * rng.normal(0, 1e-4)
            cell = {"source": "s", "student": "lean", "vertical": vertical, "arm": arm}
            figures = {"ne": 0.8, "auc": 0.7, "group_auc": 0.6 * level, "ndcg": 0.5 * level}
            results.append({**cell, **figures, "seed": seed, "calibration": 1.0, "groups": 9})
    kept = {"recipe": "R", "planned": 50, "environment": quality.common.environment()}
    text = "".join(ranking.table({**kept, "results": results}))
    change = ranking.changes(results, "R")
    assert change is not None and change["group_auc"].shape == (5, 2)
    assert abs(change["group_auc"].mean() - 1) < 0.05 and "Not through" not in text
    assert "Met: s, lean." in text
    assert "| recipe + calibrated listwise | +1.0" in text
    for factor in (1.02, 0.98):  # no longer calibrated
        off = [
            {**r, "calibration": factor} if r["arm"] == "recipe + calibrated listwise" else r
            for r in results
        ]
        assert "Met: **nowhere**" in "".join(ranking.table({**kept, "results": off}))
    part = "".join(ranking.table({**kept, "results": results[1:]}))  # without a whole seed
    assert "Not through: 49 of 50" in part and "and 4 seeds" in part
    assert "Of these 2 differences 1 are above 0 and 0 below" in text


def check_what_is_kept_is_read_again() -> None:
    """One table alone leaves the others as they are, to the byte."""
    text = quality.KEPT_FILE.read_text()
    kept = quality.json.loads(text)
    assert quality_report.as_text(kept) == text
    ranked = {"recipe": "R", "planned": 0, "environment": {}, "results": []}
    again = quality.json.loads(quality_report.as_text({**kept, "ranking": ranked}))
    assert again == {**kept, "ranking": ranked}
    page = "# Q\n\n## 1. A\n\na\n\n## 2. B\n\nb\n"
    new = quality_report.put_section(page, "\n## 7. R\n\nr\n")
    assert new == page.replace("\n## 2. B", "\n## 7. R\n\nr\n\n## 2. B")
    assert quality_report.put_section(new, "\n## 7. R\n\ns\n") == new.replace("r\n", "s\n")


def check_a_cell_is_kept_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells" / "x.json"
        try:
            quality.write(path, lambda file: 1 / 0)
        except ZeroDivisionError:
            assert not path.exists()
        quality.write(path, lambda file: file.write(b"{}"))
        assert [entry.name for entry in path.parent.iterdir() if entry.suffix == ".json"] == [
            "x.json"
        ]


def main() -> None:
    passes.start()
    passes.TEACHER_BATCH = BATCH
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

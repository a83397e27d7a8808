"""Studies: the passes, the figures, the report and the command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_checks as checks
import torch
from ranks import Ranks, check_name
from scipy import stats
from torchmetrics.functional.classification import binary_auroc

from torchrec_exfm import DistillationTerm, Task, study
from torchrec_exfm.losses import listwise, pairwise
from torchrec_exfm.study import ARMS, Arm, Pass, __main__, figures
from torchrec_exfm.study.figures import Changes, compare_arms, generation_ratio, losses, p_value
from torchrec_exfm.study.report import (
    Finding,
    Run,
    compute_results,
    sentence,
    summarize_arms,
    write_report,
)
from torchrec_exfm.study.runs import _digest

ROOT = Path(__file__).parents[1]
CHECKS = [
    checks.check_none_is_the_students_own_training,
    checks.check_logits_are_from_before_the_update,
    checks.check_weight_zero_is_none,
    checks.check_control_is_a_head_on_the_label,
    checks.check_ways_to_bring_outputs,
    checks.check_a_run,
    checks.check_wrong_studies_are_refused,
    checks.check_the_planners_way,
    checks.check_adapter_and_options_are_used,
]
TASKS = (Task(name="click"), Task(name="buy"))
OLDER = "AH, by the older teacher"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
def test_ranks(ranks: Ranks, check: Any) -> None:
    ranks.run(check)


# Figures


def reference(logits: Any, labels: Any) -> dict[str, float]:
    """Compute the figures by definition in float64; the AUC by torchmetrics."""
    p, y = 1 / (1 + np.exp(-logits.astype(np.float64))), labels.astype(np.float64)
    rate = y.mean()
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    area = binary_auroc(torch.from_numpy(p), torch.from_numpy(y).long(), thresholds=None)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return {"ne": loss / entropy, "auc": float(area), "calibration": p.mean() / rate}


@pytest.mark.parametrize("digits", [0, 1, 6], ids=lambda digits: f"{digits}_digits")
def test_figures_are_those_of_the_definitions(digits: int) -> None:
    random = np.random.default_rng(digits)
    logits = random.normal(-1, 2, 500).round(digits).astype(np.float32)
    labels = (random.random(500) < 0.3).astype(np.float32)
    actual = figures(logits, labels)
    assert actual.pop("rows") == 500
    assert actual == pytest.approx(reference(logits, labels), rel=1e-6)


def test_figures_stay_finite_for_sure_logits_and_are_nan_where_undefined() -> None:
    sure = figures(np.float32([-200, 200, 200, -200]), np.float32([0, 1, 0, 1]))
    assert sure["ne"] == pytest.approx(100 / np.log(2)) and sure["auc"] == 0.5
    for labels in ([], [0, 0], [1, 1]):
        actual = figures(np.zeros(len(labels), np.float32), np.float32(labels))
        assert np.isnan(actual["auc"]) and not np.isfinite(actual["ne"])


def test_p_is_that_of_a_paired_t_test() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    assert p_value(first - second) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert np.isnan(p_value(np.array([1.0]))) and np.isnan(p_value(np.zeros(3)))


# The report, of passes that are made up


def made_up() -> list[Run]:
    """Return made-up runs: three seeds, four arms, two tasks, some labels and outputs missing."""
    random = np.random.default_rng(5)
    size = 1200
    odds = random.normal(-1, 1.5, (size, 2))
    labels = (random.random((size, 2)) < 1 / (1 + np.exp(-odds))).astype(np.float32)
    labels[random.random((size, 2)) < [0.0, 0.3]] = np.nan
    labels[1000:1100] = np.nan  # a whole stretch
    periods = np.arange(size, dtype=np.int32) // 100
    arms = {**ARMS, OLDER: Arm(ARMS["AH"].terms, "older")}
    spread = {"none": 1.5, "head on the label": 1.45, "AH": 1.2, OLDER: 1.3}
    runs = []
    for seed in range(3):
        for name, noise in spread.items():
            arm = arms[name]
            teacher = odds + random.normal(0, 1 if arm.teacher == "older" else 0.5, (size, 2))
            teacher[random.random(size) < 0.2] = np.nan
            spoken = arm.terms and arm.teacher != "labels"
            result = Pass(
                (odds + random.normal(0, noise, (size, 2))).astype(np.float32),
                labels,
                teacher.astype(np.float32)[: size if spoken else 0, None],
                periods,
                float(random.uniform(1, 2)),
            )
            runs.append(Run(name, arm, seed, result, periods >= 4))
    return runs


def test_results_are_of_the_examples_that_are_meant() -> None:
    """Only counted and labelled examples; "covered" figures also need a teacher output."""
    runs = made_up()
    results = {(r["arm"], r["seed"], r["part"]): r for r in compute_results(runs, TASKS)}
    assert len(results) == (4 + 2) * 3 * 2
    passes = {(run.name, run.seed): run.outcome for run in runs}
    for (arm, seed, part), row in results.items():
        t = ["click", "buy"].index(part)
        labels = passes["none", seed].labels[:, t]
        teacher = passes["AH", seed].teacher[:, 0, t]
        logits = {
            "the teacher itself": teacher,
            "the older teacher itself": passes[OLDER, seed].teacher[:, 0, t],
        }.get(arm)
        logits = passes[arm, seed].logits[:, t] if logits is None else logits
        rows = (np.arange(1200) >= 400) & ~np.isnan(labels) & ~np.isnan(logits)
        expected = reference(logits[rows], labels[rows])
        assert row["rows"] == rows.sum()
        assert {figure: row[figure] for figure in expected} == pytest.approx(expected, rel=1e-6)
        rows &= ~np.isnan(teacher) & ~np.isnan(passes[OLDER, seed].teacher[:, 0, t])
        expected = reference(logits[rows], labels[rows])
        assert row["covered_ne"] == pytest.approx(expected["ne"], rel=1e-6)
        assert row["covered_auc"] == pytest.approx(expected["auc"], rel=1e-6)


def test_findings_are_changes_against_the_student_alone() -> None:
    runs = made_up()
    results = compute_results(runs, TASKS)
    findings = summarize_arms(runs, results)
    assert list(findings) == ["head on the label", "AH", OLDER]
    passes = {(run.name, run.seed): run.outcome for run in runs}

    def value(arm: str, figure: str) -> Any:
        return np.array(
            [[row_of(arm, seed, part)[figure] for part in ("buy", "click")] for seed in range(3)]
        )

    def row_of(arm: str, seed: int, part: str) -> Any:
        return next(r for r in results if (r["arm"], r["seed"], r["part"]) == (arm, seed, part))

    for name, finding_of_arm in findings.items():
        for figure in ("ne", "auc"):
            ratio = value(name, figure) / value("none", figure)
            np.testing.assert_allclose(getattr(finding_of_arm.change, figure), 100 * (ratio - 1))
        np.testing.assert_allclose(finding_of_arm.change.calibration, value(name, "calibration"))
        np.testing.assert_allclose(finding_of_arm.over_time, over_time(passes, name), rtol=1e-6)
        costs = [passes[name, s].seconds / passes["none", s].seconds for s in range(3)]
        assert finding_of_arm.cost == pytest.approx(sorted(costs)[1])

    def lead(arm: str) -> float:
        covered = value(arm, "covered_ne") / value("none", "covered_ne")
        return float(1 - covered.mean())

    teacher, older = (
        study_changes(results, name) for name in ("the teacher itself", "the older teacher itself")
    )
    assert findings["AH"].covered.eta(teacher) == pytest.approx(
        lead("AH") / lead("the teacher itself")
    )
    ratio = generation_ratio(findings["AH"].covered, findings[OLDER].covered, teacher, older)
    gained = lead("the teacher itself") - lead("the older teacher itself")
    assert ratio == pytest.approx((lead("AH") - lead(OLDER)) / gained)


def study_changes(results: Any, name: str) -> Changes:
    arm_rows, none = ([r for r in results if r["arm"] == arm] for arm in (name, "none"))
    changes = compare_arms(arm_rows, none, ("covered_ne", "covered_auc"))
    assert changes is not None
    return changes


def over_time(passes: Any, name: str) -> list[float]:
    """Return the changes by stretch of time, from the losses of all seeds; one has no label."""
    changes = []
    for period in (4, 5, 6, 7, 8, 9, 11):
        rows = slice(100 * period, 100 * period + 100)
        arm_ne, student_ne = (
            np.nansum(
                [losses(passes[arm, s].logits[rows], passes[arm, s].labels[rows]) for s in range(3)]
            )
            for arm in (name, "none")
        )
        changes.append(100 * (arm_ne / student_ne - 1))
    return changes


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    runs = made_up()
    text = write_report(tmp_path / "new", runs, TASKS)
    assert (tmp_path / "new" / "table.md").read_text() == text
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "new" / "table.json").read_text())
    findings = summarize_arms(runs, results)
    ne = findings["AH"].change.ne.mean(1)
    (line,) = (line for line in text.splitlines() if line.startswith("| AH |"))
    assert f"{ne.mean():+.2f} ± {ne.std(ddof=1):.2f} % (p " in line
    assert line.endswith(f"| {findings['AH'].cost:.2f} |")
    assert "means over 3 seeds and 2 tasks, of 800 examples" in text
    assert "over 7 stretches of time" in text and "Generation ratio of AH, by" in text
    assert sentence(findings) in text
    alone = write_report(tmp_path, [run for run in runs if run.seed == 0], TASKS)
    assert "means over 1 seed and 2 tasks" in alone and "nan" not in alone


# The sentence, of findings that are made up


def finding(
    arm: Arm, mean: float, spread: float = 0.05, *, seeds: int = 3, draw: int = 0
) -> Finding:
    """Return NE changes by seed and by stretch of time, with this mean and standard deviation."""
    random = np.random.default_rng(draw)

    def around_mean(size: int) -> Any:
        values = random.normal(size=size)
        scale = values.std(ddof=1) if size > 1 else 1
        return mean + spread * (values - values.mean()) / scale

    ne = around_mean(seeds)[:, None]
    change = Changes(ne, -ne, list(range(seeds)), ["label"], np.ones((seeds, 1)))
    return Finding(arm, change, change, around_mean(8), 1.25)


def named(**means: float) -> dict[str, Finding]:
    names = {"head": "head on the label", "ah": "AH", "sa": "AH + SA by margin"}
    names["serving"] = "serving head"
    return {
        names[key]: finding(ARMS[names[key]], mean, draw=draw)
        for draw, (key, mean) in enumerate(means.items())
    }


def test_the_simplest_of_equal_settings_is_taken() -> None:
    text = sentence(named(head=0.0, ah=-1.0, sa=-1.001, serving=-0.5))
    assert text == (
        "Take AH: NE -1.00 % (95 % interval -1.12 to -0.88 over 3 seeds), 1.00 % below a head on "
        "the label, at 1.25 of the cost of training."
    )


def test_a_setting_that_is_surely_better_is_taken() -> None:
    assert sentence(named(head=0.0, ah=-1.0, sa=-2.0)).startswith("Take AH + SA by margin: NE -2.0")


def test_a_teacher_on_the_serving_head_is_taken_with_a_caution() -> None:
    text = sentence(named(head=0.0, ah=-1.0, serving=-2.0))
    assert text.startswith("Take serving head") and text.endswith("serves any bias of it.")


def test_nothing_pays() -> None:
    findings = named(head=0.0, ah=0.5, sa=0.2)
    assert sentence(findings) == (
        "It does not pay here: the best setting, AH + SA by margin, changes NE by +0.20 % (95 % "
        "interval +0.08 to +0.32 over 3 seeds), and that is not surely below the student alone and "
        "a head on the label without any teacher."
    )
    noisy = {"AH": finding(ARMS["AH"], -1.0, 2.0)}
    assert sentence(noisy).endswith("not surely below the student alone.")


def test_what_a_head_on_the_label_brings_as_well_is_no_gain_of_a_teacher() -> None:
    assert sentence(named(head=-1.0, ah=-1.0)).startswith("It does not pay here")
    assert sentence(named(head=-1.5, ah=-1.0)).startswith("It does not pay here")
    assert sentence(named(ah=-1.0)).startswith("Take AH")  # without that control
    findings = named(head=0.0, ah=-1.0)
    assert sentence(findings).startswith("Take AH")
    for alike in ({"change": findings["AH"].change}, {"over_time": findings["AH"].over_time}):
        control = findings["head on the label"]._replace(**alike)
        text = sentence(findings | {"head on the label": control})
        assert text.startswith("It does not pay here")  # over seeds alone, or over time alone


def test_p_is_multiplied_by_the_number_of_settings() -> None:
    """Over seeds, p is 0.03: enough for one setting, not for the better of two."""
    spread = 0.3
    single = {"AH": finding(ARMS["AH"], -1.0, spread)}
    assert 0.025 < p_value(single["AH"].change.ne[:, 0]) < 0.05
    assert sentence(single).startswith("Take AH")
    pair = {**single, "serving head": finding(ARMS["serving head"], -0.9, spread)}
    assert sentence(pair).startswith("It does not pay here")


def test_one_seed_is_judged_over_time() -> None:
    text = sentence({"AH": finding(ARMS["AH"], -1.0, seeds=1)})
    assert re.match(r"Take AH: NE -1\.00 % \(95 % interval .* over 8 stretches of time\)", text)
    one_stretch = finding(ARMS["AH"], -1.0, seeds=1)._replace(over_time=np.array([-1.0]))
    assert "changes NE by -1.00 %, and" in sentence({"AH": one_stretch})


def test_without_a_teacher_there_is_nothing_to_say() -> None:
    assert sentence(named(head=0.0)) == "No arm with a teacher has figures."
    older = finding(Arm((DistillationTerm(),), "older"), -1.0)
    assert sentence({OLDER: older}) == "No arm with a teacher has figures."


# The command


def command(module: Path, out: Path) -> list[str]:
    options = ["-m", "torchrec_exfm.study", str(module), "--seeds", "2", "--out", str(out)]
    return [sys.executable, *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(module: Path, out: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(module, out), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
    )


def test_the_command_runs_the_example_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    module = tmp_path / "short.py"  # the example with a twelfth of its stream
    examples = str(ROOT / "examples")
    module.write_text(
        f"import sys\n\nsys.path.insert(0, {examples!r})\nimport study_minimal\n"
        "from study_minimal import *\n\nstudy_minimal.BATCHES = 20\n"
    )
    killed = tmp_path / "killed"
    with start(module, killed) as process:
        deadline = time.monotonic() + 100
        while len(list(killed.glob("passes/*.npz"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert "1 of 10: none, seed 0 (time left: known after it)" in errors
    times = {path: path.stat().st_mtime_ns for path in killed.glob("passes/*.npz")}
    assert 3 <= len(times) < 10 and not (killed / "table.md").exists()

    with start(module, killed) as process:
        output, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    assert times.items() <= {p: p.stat().st_mtime_ns for p in killed.glob("passes/*.npz")}.items()
    assert output.strip() == (killed / "table.md").read_text().strip()
    assert re.search(r"^(Take|It does not pay here:) ", output, re.MULTILINE)
    assert (killed / "picture.png").stat().st_size > 1000
    arms = {r["arm"] for r in json.loads((killed / "table.json").read_text())}
    assert arms == {*ARMS, "the teacher itself"}
    assert len(errors.splitlines()) < 30 and "Warning" not in errors, errors


def test_a_pass_is_kept_under_all_that_it_is_of() -> None:
    names = {
        _digest(name, Arm((term,), teacher), seed, key)
        for name, term, teacher, seed, key in (
            ("AH", DistillationTerm(), "teacher", 0, ""),
            ("another", DistillationTerm(), "teacher", 0, ""),
            ("AH", DistillationTerm(beta=2.0), "teacher", 0, ""),
            ("AH", DistillationTerm(loss=pairwise()), "teacher", 0, ""),
            ("AH", DistillationTerm(loss=listwise()), "teacher", 0, ""),
            ("AH", DistillationTerm(loss=listwise(calibrated=True)), "teacher", 0, ""),
            ("AH", DistillationTerm(), "labels", 0, ""),
            ("AH", DistillationTerm(), "teacher", 1, ""),
            ("AH", DistillationTerm(), "teacher", 0, "changed"),
        )
    }
    assert len(names) == 9


def test_an_arm_that_diverges_is_not_taken() -> None:
    runs = []
    for run in made_up():
        logits = run.outcome.logits.copy()
        if run.name == "AH" and run.seed == 1:
            logits[900:] = np.nan
        runs.append(run._replace(outcome=dataclasses.replace(run.outcome, logits=logits)))
    findings = summarize_arms(runs, compute_results(runs, TASKS))
    assert np.isnan(findings["AH"].change.ne[1]).all() and np.isnan(findings["AH"].over_time).any()
    assert sentence(findings) == "No arm with a teacher has figures."


def test_a_module_that_lacks_something_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = tmp_path / "lacking_study.py"
    module.write_text("tap = 'top'\n")
    with pytest.raises(SystemExit, match=r"should define .*; received one without make_student, s"):
        __main__._names_in(module)
    monkeypatch.setattr(sys, "argv", ["study", str(tmp_path / "none.py")])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "module should be a Python file; received" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "numpy", "scipy", "tqdm"])
def test_a_package_that_is_not_installed_is_told(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"{package} is not installed: pip install '.*\[study\]'"
    ):
        importlib.reload(study)

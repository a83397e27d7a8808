"""RunMonitor: every point of every curve against a reference, the console line, the cost."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import das_data as dd
import numpy as np
import pytest
import rank_checks_metrics as metrics_checks
import rank_models as rm
import torch
from costs import Costs
from models import CPU, dlrm_train, make_batch, make_teacher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import torchrec_exfm
from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    ExFMWarning,
    ExFMWrapper,
    RunMonitor,
    StudentAdapter,
    TeacherMissingWarning,
    TeacherOutputs,
    TrainPipelineExFM,
)
from torchrec_exfm import monitor as monitor_module
from torchrec_exfm import sources as exfm_sources
from torchrec_exfm import tasks as tasks_module
from torchrec_exfm.das import TeacherLookup

STEPS = 7
B = rm.GLOBAL_SIZE
TERMS = (*rm.HEADS, *rm.MARGINS)
LEADS = (  # of the columns behind the three of the heads
    "lead/a/adapted/serving/click",
    "lead/a/adapted/serving/stay",
    "lead/b/serving/click",
)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor_module, "perf_counter", clock)
    return clock


class Run:
    """A training with two teachers and two tasks, which records each step."""

    def __init__(self) -> None:
        self.data = metrics_checks.clicked(rm.global_data(steps=STEPS))
        self.wrapper = rm.wrapped(terms=TERMS)
        optimizer = torch.optim.SGD(self.wrapper.parameters(), lr=0.2)
        self.pipeline = TrainPipelineExFM(
            self.wrapper, optimizer, CPU, teacher=rm.informed, adapter=rm.two_task_adapter()
        )
        self.metrics = ExFMMetrics(batch_size=B, device=CPU, tasks=rm.TASKS, teachers=rm.TEACHERS)
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.student: list[float] = []
        self.terms: list[Tensor] = []
        self.leads: list[list[float]] = []
        self.adapter: list[float] = []
        self._batches = iter(self.data)

    def monitor(self, **options: Any) -> RunMonitor:
        return RunMonitor(self.pipeline, self.metrics, **{"progress": False, **options})

    def steps(self, monitor: RunMonitor, number: int = STEPS, clock: Clock | None = None) -> None:
        for _ in range(number):
            batch, adapter = self.data[len(self.outputs)], copy.deepcopy(self.pipeline.adapter)
            assert adapter is not None
            self.adapter.append(
                metrics_checks.expected_adapter_loss(adapter, rm.informed(batch), batch.labels)
            )
            output = self.pipeline.progress(self._batches)
            loss, logits, labels = (value.clone() for value in output)
            assert self.wrapper.last_losses is not None
            self.outputs.append((logits, labels))
            self.student.append(float(loss))
            self.terms.append(self.wrapper.last_losses.double())
            self.leads.append(self._leads())
            if clock is not None:
                clock.now += len(self.outputs)
            monitor.step(output)

    def _leads(self) -> list[float]:
        target, student = torch.cat(self.wrapper.auxiliary_head.lead_losses, 1).tolist()
        columns = zip(target, student, [1.5, 1.5, 0.9], strict=True)
        return [min(max((1 - t / s) / margin, 0.0), 1.0) for t, s, margin in columns]

    def expected(self, begin: int, end: int) -> dict[str, float]:
        """Return the scalars after step ``end``, where the last writing was after ``begin``."""
        interval = slice(begin, end)
        return {
            **metrics_checks.expected_metrics(self.outputs[:end], self.data[:end]),
            **metrics_checks.expected_losses(TERMS, self.terms[interval], self.data[interval]),
            "student_loss": sum(self.student[interval]) / (end - begin),
            "adapter_loss": sum(self.adapter[interval]) / (end - begin),
            "teacher_failures": 0,
            **dict(zip(LEADS, self.leads[end - 1], strict=True)),
            "examples_per_second": B * (end - begin) / sum(range(begin + 1, end + 1)),
        }


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the curves in the files: by tag, the value at each x."""
    events = EventAccumulator(str(folder)).Reload()
    written = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, points in written.items():
        assert len({point.step for point in points}) == len(points), tag
    return {tag: {p.step: p.value for p in points} for tag, points in written.items()}


def at(x: int, written: dict[str, dict[int, float]]) -> dict[str, float]:
    return {tag: points[x] for tag, points in written.items() if x in points}


@pytest.mark.parametrize("every_steps", [1, 3, STEPS, 100])
def test_every_point_of_every_curve(every_steps: int, tmp_path: Path, clock: Clock) -> None:
    run = Run()
    with run.monitor(folder=tmp_path, every_steps=every_steps) as monitor:
        run.steps(monitor, clock=clock)
    written = curves(tmp_path)
    begins = range(0, STEPS, every_steps)
    ends = [min(begin + every_steps, STEPS) for begin in begins]
    assert sorted({x for points in written.values() for x in points}) == [B * end for end in ends]
    for begin, end in zip(begins, ends, strict=True):
        expected = run.expected(begin, end)
        assert at(B * end, written) == pytest.approx(expected, rel=1e-6, abs=0)
    assert monitor.last == pytest.approx(expected, rel=1e-6, abs=0)


def test_the_data_of_these_tests_can_tell() -> None:
    """A term lacks outputs at some steps, leads are neither 0 nor 1, and losses differ."""
    run = Run()
    run.steps(run.monitor())
    assert 0.0 in [float(losses[1]) for losses in run.terms]
    assert any(0 < lead < 1 for leads in run.leads for lead in leads)
    assert len(set(run.student)) == len(set(run.adapter)) == STEPS
    assert len(run.expected(2, 3)) < len(run.expected(0, 3))


# ---- Scalars ----


def test_scalars_are_what_tensorboard_gets(tmp_path: Path) -> None:
    """Empty before the first writing; then its values, by the same tags, until the next one."""
    run = Run()
    with run.monitor(folder=tmp_path, every_steps=2) as monitor:
        run.steps(monitor, 1)
        assert monitor.scalars() == {} and monitor.examples == 0
        run.steps(monitor, 1)
        first = monitor.scalars()
        run.steps(monitor, 1)
        assert monitor.scalars() == first == monitor.last and monitor.examples == 2 * B
    written, last = curves(tmp_path), monitor.scalars()
    assert monitor.examples == 3 * B
    assert last != first and {"adapter_loss", "student_loss", "ne/click"} <= last.keys()
    assert at(2 * B, written) == pytest.approx(first, rel=1e-6)
    assert at(3 * B, written) == pytest.approx(last, rel=1e-6)


def test_scalars_are_a_copy() -> None:
    pipeline, metrics = small_run()
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        monitor.step(pipeline.progress(batches()))
    monitor.scalars().clear()
    assert "ne/label" in monitor.scalars()


def test_scalars_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation, and so no wait for the device, and no metric: one rank may ask alone."""
    pipeline, metrics = small_run()
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        monitor.step(pipeline.progress(batches()))
    monkeypatch.setattr(metrics, "compute", None)
    with Costs() as costs:
        assert monitor.scalars()
    assert not costs.operations


def adapted_run(labels: Tensor) -> tuple[TrainPipelineExFM, ExFMMetrics]:
    """Return a run of one teacher whose adapter learns from these labels."""
    terms = DistillationTerm(), DistillationTerm(adapted=True)
    return small_run(*terms, adapter=StudentAdapter(), labels=lambda batch: labels)


def test_the_adapter_has_no_loss_without_a_label() -> None:
    """Neither a curve at 0, nor a step that counts in the mean."""
    labels = torch.full((8,), torch.nan)
    pipeline, metrics = adapted_run(labels)
    monitor = RunMonitor(pipeline, metrics, every_steps=2, progress=False)
    feed, losses = batches(4), []
    for step in range(4):
        if step == 3:
            labels.copy_(torch.tensor([0.0, 1.0] * 4))
        monitor.step(pipeline.progress(feed))
        losses.append(monitor.scalars().get("adapter_loss"))
    assert losses[:3] == [None] * 3
    logits = make_teacher(0, 8).values.flatten()  # of an adapter that is still the identity
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert losses[3] == pytest.approx(float(expected))


def test_a_diverged_adapter_shows() -> None:
    pipeline, metrics = adapted_run(torch.tensor([0.0, 1.0] * 4))
    assert pipeline.adapter is not None
    monitor, feed = RunMonitor(pipeline, metrics, every_steps=2, progress=False), batches(2)
    monitor.step(pipeline.progress(feed))
    next(pipeline.adapter.parameters()).data.fill_(torch.nan)
    monitor.step(pipeline.progress(feed))
    assert math.isnan(monitor.scalars()["adapter_loss"])


def test_watching_the_adapter_changes_nothing() -> None:
    """To the bit: its parameters and the student's, and the random numbers."""
    states = []
    for watched in (True, False):
        torch.manual_seed(3)
        pipeline, metrics = adapted_run(torch.tensor([0.0, 1.0] * 4))
        if watched:
            RunMonitor(pipeline, metrics, progress=False)
        feed = batches(3)
        for _ in range(3):
            pipeline.progress(feed)
        assert watched == bool(pipeline._steps.adapter_loss[1])  # type: ignore[index]
        assert pipeline.adapter is not None
        parameters = [*pipeline.adapter.parameters(), *pipeline.model.parameters()]
        states.append([*parameters, torch.get_rng_state()])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_watching_the_adapter_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checks of labels read values, and only on the CPU."""
    monkeypatch.setattr(tasks_module, "_check_values", lambda *_: None)
    costs = {}
    for watched in (True, False):
        pipeline, metrics = adapted_run(torch.tensor([0.0, 1.0] * 4))
        if watched:
            RunMonitor(pipeline, metrics, progress=False)
        feed = batches(3)
        pipeline.progress(feed)
        with Costs() as costs[watched]:
            pipeline.progress(feed)
    assert costs[True].syncs == costs[False].syncs
    assert 0 < costs[True].kernels - costs[False].kernels < 25


# ---- Before and after ----


@pytest.mark.parametrize("start", ["an argument", "the metrics"])
def test_a_resumed_run_continues_its_curves(tmp_path: Path, start: str) -> None:
    """Points beyond the checkpoint are hidden, and those before it stay."""
    killed, resumed = Run(), Run()
    monitor = killed.monitor(folder=tmp_path, every_steps=1)
    killed.steps(monitor, 2)
    saved = killed.metrics.state_dict()
    killed.steps(monitor, 2)
    options = {"start_examples": 2 * B} if start == "an argument" else {}
    with resumed.monitor(folder=tmp_path, every_steps=1, **options) as monitor:
        if start == "the metrics":  # restored after the monitor was made, as by train_windows
            resumed.metrics.load_state_dict(saved)
        resumed.steps(monitor, 1)
    losses = [*killed.student[:2], *resumed.student[:1]]
    expected = dict(zip((B, 2 * B, 3 * B), losses, strict=True))
    assert curves(tmp_path)["student_loss"] == pytest.approx(expected)


def test_an_error_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics are not computed then: a rank that failed would leave the others waiting."""
    run = Run()
    computed: list[int] = []
    compute = run.metrics.compute
    monkeypatch.setattr(run.metrics, "compute", lambda: computed.append(1) or compute())
    threads = set(threading.enumerate())
    with (
        pytest.raises(KeyError, match="on purpose"),
        run.monitor(folder=tmp_path, every_steps=2) as monitor,
    ):
        run.steps(monitor, 3)
        raise KeyError("on purpose")
    assert list(curves(tmp_path)["student_loss"]) == [2 * B]
    assert len(computed) == 1
    assert set(threading.enumerate()) <= threads  # the writer's has ended


def test_a_killed_run_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on the disk before the next step, whatever the writer's own interval."""
    run = Run()
    last_points: list[set[int]] = []
    flush = SummaryWriter.flush

    def flush_and_read(writer: SummaryWriter) -> None:
        flush(writer)
        last_points.append({max(points) for points in curves(tmp_path).values()})

    monkeypatch.setattr(SummaryWriter, "flush", flush_and_read)
    monitor = run.monitor(folder=tmp_path, every_steps=1)
    run.steps(monitor, 2)
    assert [max(points) for points in last_points] == [B, 2 * B]
    monitor.close()
    monitor.close()


def test_without_a_step_nothing_is_written(tmp_path: Path) -> None:
    with Run().monitor(folder=tmp_path):
        pass
    assert curves(tmp_path) == {}


# ---- Names ----


def small_run(
    *terms: DistillationTerm, teacher: Any = None, **options: Any
) -> tuple[TrainPipelineExFM, ExFMMetrics]:
    """Return a run of one teacher and one task with batches of 8."""
    wrapper = ExFMWrapper(dlrm_train(), tap="model.over_arch", terms=terms or (DistillationTerm(),))
    pipeline = TrainPipelineExFM(
        wrapper,
        torch.optim.SGD(wrapper.parameters(), lr=0.1),
        CPU,
        teacher=teacher or (lambda batch: make_teacher(0, len(batch.labels))),
        **options,
    )
    return pipeline, ExFMMetrics(batch_size=8, device=CPU)


def batches(steps: int = STEPS) -> Iterator[Any]:
    return iter([make_batch(seed) for seed in range(steps)])


def test_terms_of_one_name_have_curves_of_their_own() -> None:
    pipeline, metrics = small_run(DistillationTerm(), DistillationTerm(hidden=(4,)))
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        monitor.step(pipeline.progress(batches()))
    losses = pipeline._model.last_losses.tolist()
    names = ["distillation_loss/teacher#0", "distillation_loss/teacher#1"]
    assert [monitor.last[name] for name in names] == losses and losses[0] != losses[1]


def test_what_a_lookup_counts(tmp_path: Path) -> None:
    """By the wrapper's name of the teacher; of 8 examples 2 have outputs, 1 is stale, 5 missing."""
    store = dd.small_store(tmp_path / "store")
    lookup = TeacherLookup(
        store,
        "fm",
        ids=lambda batch: torch.arange(8),
        event_seconds=lambda batch: torch.tensor([dd.AT, dd.AT, dd.AT + 2] + [dd.AT] * 5),
        max_age_seconds=dd.AT - 1000 + 1,
    )
    pipeline, metrics = small_run(teacher=lookup)
    feed = batches()
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        for _ in range(STEPS):
            monitor.step(pipeline.progress(feed))
    counters = {name: value for name, value in monitor.last.items() if name.startswith("lookup/")}
    assert counters == {
        "lookup/teacher/missing": 5 * STEPS,
        "lookup/teacher/stale": STEPS,
        "lookup/teacher/quarantined": 0,
        "lookup/teacher/late": 0,
    }
    assert monitor.last["coverage/teacher/label"] == 2 / 8


def test_failures_of_a_teacher_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term without any output has no mean, rather than one of 0."""
    monkeypatch.setattr(exfm_sources, "RETRY_SECONDS", 0.0)
    asked = itertools.count()

    def teacher(batch: Any) -> TeacherOutputs:
        if next(asked) >= 3:
            raise ConnectionError("no route")
        return make_teacher(0, len(batch.labels))

    pipeline, metrics = small_run(teacher=teacher, on_teacher_error="mask")
    monitor = RunMonitor(pipeline, metrics, every_steps=3, progress=False)
    feed, lasts = batches(6), []
    with pytest.warns(TeacherMissingWarning, match="no route"):
        for _ in range(6):
            monitor.step(pipeline.progress(feed))
            lasts.append(monitor.last)
    assert "distillation_loss/teacher" in lasts[2] and lasts[2]["coverage/teacher/label"] == 1
    assert "distillation_loss/teacher" not in lasts[5] and lasts[5]["teacher_failures"] == 3
    assert lasts[5]["coverage/teacher/label"] == 0.5


# ---- The line ----


def line_of(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[list[str], RunMonitor]:
    """Return the drawings of the line in seven steps, each written, and the monitor."""
    pipeline, metrics = small_run()
    feed = batches()
    options = {"every_steps": 1, "total_examples": 8 * STEPS, **options}
    with RunMonitor(pipeline, metrics, **options) as monitor:
        for _ in range(STEPS):
            monitor.step(pipeline.progress(feed))
    captured = capsys.readouterr()
    assert not captured.out
    return [part for part in captured.err.replace("\n", "\r").split("\r") if part.strip()], monitor


def test_the_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_LOG_SECONDS", 0.0)
    drawn, monitor = line_of(capsys)
    assert len(drawn) >= STEPS
    assert "29%" in drawn[2] and "16.0/56.0" in drawn[2] and "<00:" in drawn[2]  # time left
    shown = {
        "NE": monitor.last["ne/label"],
        "AUC": monitor.last["auc/label"],
        "calibration": monitor.last["calibration/label"],
        "coverage": monitor.last["coverage/teacher/label"],
    }
    assert ", ".join(f"{name}={value:.4f}" for name, value in shown.items()) + "]" in drawn[-1]
    assert "100%" in drawn[-1] and "56.0/56.0" in drawn[-1]


def test_the_line_in_a_file_is_drawn_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    drawn, _ = line_of(capsys)
    assert len(drawn) == 2 and "56.0/56.0" in drawn[-1]


def test_the_line_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    drawn, monitor = line_of(capsys, start_examples=1000, total_examples=None)
    assert "1.06kex" in drawn[-1]
    rate = re.search(r"([\d.]+)(k?)ex/s", drawn[-1])
    assert rate is not None
    own_rate = 8 * STEPS / max(monitor._bar.format_dict["elapsed"], 1e-9)
    assert float(rate[1]) * (1000 if rate[2] else 1) < 3 * own_rate  # without the 1000 before


def test_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, progress=False)[0] == []


def test_the_line_names_several_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    with run.monitor(progress=True) as monitor:
        run.steps(monitor, 1)
    line = capsys.readouterr().err
    assert f"NE={monitor.last['ne/click']:.4f}, " in line
    assert f"MSE={monitor.last['mse/stay']:.4f}, " in line
    assert f"coverage/b/stay={monitor.last['coverage/b/stay']:.4f}" in line


# ---- Students of other outputs, and metrics that are not defined ----


class ByName(torch.nn.Module):
    """A student that returns a dict, and some of whose labels are missing."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.student = dlrm_train()
        self.labels = labels

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, (_, logits, _) = self.student(batch)
        return loss, {"total": loss.detach(), "score": logits.detach(), "clicked": self.labels}


def by_name(labels: list[float], **options: Any) -> tuple[TrainPipelineExFM, ExFMMetrics]:
    wrapper = ExFMWrapper(ByName(torch.tensor(labels)), tap="student.model.over_arch")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=lambda batch: make_teacher(0, 8))
    return pipeline, ExFMMetrics(batch_size=8, device=CPU, **options)


def test_outputs_by_name() -> None:
    """``outputs`` of the metrics serves the monitor too, for the loss as well."""
    clicked = [1.0, 0.0, torch.nan, 1.0, 0.0, 0.0, torch.nan, 1.0]
    pipeline, metrics = by_name(
        clicked, outputs=lambda output: (output["total"], output["score"], output["clicked"])
    )
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        output = pipeline.progress(batches())
        monitor.step(output)
    expected = metrics_checks.binary_figures(
        output["score"].double().flatten().numpy(), np.array(clicked), np.ones(8)
    )
    for name, value in expected.items():
        assert monitor.last[name.replace("click", "label")] == pytest.approx(value, rel=1e-6)
    assert monitor.last["student_loss"] == float(output["total"])


def test_outputs_that_nobody_has_explained() -> None:
    pipeline, metrics = by_name([1.0] * 8)
    with pytest.raises(TypeError, match=r"received dict: pass ExFMMetrics\(outputs="):
        RunMonitor(pipeline, metrics, progress=False).step(pipeline.progress(batches()))


def test_metrics_that_are_not_defined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a negative: NaN on the line and on TensorBoard, and no warning."""
    pipeline, metrics = by_name([1.0] * 8, outputs=lambda output: tuple(output.values()))
    with RunMonitor(pipeline, metrics, folder=tmp_path) as monitor:
        monitor.step(pipeline.progress(batches()))
    assert "NE=nan, AUC=nan, calibration=0." in capsys.readouterr().err
    written = curves(tmp_path)
    assert math.isnan(written["ne/label"][8]) and written["calibration/label"][8] > 0


# ---- What it costs ----


def test_a_step_between_two_writings_waits_for_nothing() -> None:
    """It adds three operations to the metrics' update, and none reads a value of the device."""
    pipeline, metrics = small_run()
    feed = batches()
    monitor = RunMonitor(pipeline, metrics, progress=False)
    output = pipeline.progress(feed)
    monitor.step(output)
    with Costs() as update_costs:
        metrics.update(output, pipeline._model.last_teacher)
    with Costs() as step_costs:
        monitor.step(output)
    assert step_costs.syncs == update_costs.syncs
    assert step_costs.kernels - update_costs.kernels <= 3
    assert step_costs.operations["cat"] == update_costs.operations["cat"] + 1


# ---- What is refused ----


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder needs it, the console line alone does not."""
    pipeline, metrics = small_run()
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrec-exfm\[tensorboard\]'"):
        RunMonitor(pipeline, metrics, folder=tmp_path)
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        monitor.step(pipeline.progress(batches()))
    assert "ne/label" in monitor.last


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_steps": 0}, ValueError, "every_steps should be at least 1; received 0"),
        ({"every_steps": 1.5}, TypeError, "every_steps should be a whole number; received 1.5"),
        ({"start_examples": -1}, ValueError, "start_examples should be at least 0; received -1"),
        (
            {"start_examples": 9, "total_examples": 8},
            ValueError,
            "total_examples should be at least 9; received 8",
        ),
        (
            {"pipeline": None},
            TypeError,
            "pipeline should be of ExFMSteps; received NoneType",
        ),
        ({"metrics": {}}, TypeError, "metrics should be of ExFMMetrics; received dict"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    pipeline, metrics = small_run()
    with pytest.raises(error, match=message):
        RunMonitor(**{"pipeline": pipeline, "metrics": metrics, **options})


def test_outputs_of_another_pipeline_are_refused() -> None:
    pipeline, metrics = small_run()
    other, _ = small_run()
    with pytest.raises(RuntimeError, match="has made no such step"):
        RunMonitor(pipeline, metrics, progress=False).step(other.progress(batches()))


# ---- Warnings ----


def test_every_warning_of_the_package_is_its_own() -> None:
    """Each is an ExFMWarning, and so a RuntimeWarning: a subclass, or the class (at import)."""
    categories = []
    for path in Path(torchrec_exfm.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                categories.append(getattr(torchrec_exfm, ast.unparse(node.args[1])))
    assert len(categories) >= 6 and issubclass(ExFMWarning, RuntimeWarning)
    assert set(categories) == {ExFMWarning, *ExFMWarning.__subclasses__()}

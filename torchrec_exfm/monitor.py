"""How a training goes, for its operator: curves on TensorBoard and one line on the console.

Shapes: B examples, M teachers, T tasks, K terms, S steps between two writings.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from torchrec_exfm._ranks import on_rank_0, rank, world_size
from torchrec_exfm.auxiliary import AuxiliaryHead
from torchrec_exfm.metrics import ExFMMetrics
from torchrec_exfm.pipeline import ExFMSteps
from torchrec_exfm.wrapper import find_wrapper

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunMonitor"]

_ON_THE_LINE = {"ne": "NE", "auc": "AUC", "mse": "MSE"}
_ON_THE_LINE |= {name: name for name in ("calibration", "coverage")}
_OF_LOOKUPS = ("missing", "stale", "quarantined", "late")  # coverage and age are in the metrics
_LOG_SECONDS = 30.0  # between two lines where nobody watches, as in a file


class RunMonitor:
    """Feeds the metrics at each step, and says every so many steps how the training goes.

    On TensorBoard, over the number of examples that all ranks have seen:

    * what :class:`~torchrec_exfm.ExFMMetrics` computes, under the names that it gives;
    * ``student_loss``, the student's own, and ``distillation_loss/TERM``, unweighted: the mean
      over the ranks and over the steps since the last writing; of a term over the steps that had
      an output for it; terms of one name get their position behind it, as ``teacher#1``;
    * ``lead/TEACHER/adapted/serving/TASK`` of the terms with a margin, in [0, 1]: what multiplies
      the term's loss of that task by now (``adapted`` if the term is);
    * ``teacher_failures``, the batches that a teacher failed for, and of a ``TeacherLookup``
      ``lookup/TEACHER/missing``, ``stale``, ``quarantined`` and ``late``: what the ranks have
      counted since the pipeline and the look-up were made, added up;
    * ``examples_per_second`` of all ranks, by the wall clock since the last writing.

    On the console: how far the training is, the time left, and NE, AUC, calibration and coverage,
    by the names of task and teacher where there are several.

    Every rank makes one, in the same way, and calls ``step`` after each ``progress``; rank 0
    writes. Until it is time to write, a step costs what the metrics' update does and a few numbers
    that are set aside on the device, for which nothing waits. As a context manager it writes what
    is left at its end, unless an exception ends it: then it closes what was written.

    Args:
        pipeline: that of the run.
        metrics: of the same tasks and teachers; it is updated here, and nowhere else.
        folder: of the run on TensorBoard; needs ``pip install 'torchrec-exfm[tensorboard]'``.
            None: nothing but the line.
        total_examples: of all ranks in the whole run, for the time left; None: not known.
        start_examples: of all ranks, before the first step. None: as many as the metrics have
            counted, so that a run which was stopped goes on where it was, if they were saved and
            taken up with it. Curves that an earlier run has in the folder are hidden from there on.
        every_steps: how many steps from one writing to the next. Each computes the metrics over
            all ranks, and for the AUC sorts their window.
        progress: False for no line.

    Attributes:
        last: what was last written, by name; on every rank, and without a folder too.

    Raises:
        ValueError: for a number that is too small.
        TypeError: for another kind of pipeline, metrics or number.
        ImportError: if there is a folder and no TensorBoard.
        OSError: if the folder can't be written.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.datasets.random import RandomRecDataset
        >>> from torchrec.models.dlrm import DLRM, DLRMTrain
        >>> from torchrec_exfm import ExFMWrapper, TeacherOutputs, TrainPipelineExFM
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=4, num_embeddings=10, feature_names=["f"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 3, [4], [5, 1])
        >>> model, device = ExFMWrapper(DLRMTrain(dlrm), tap="model.over_arch"), torch.device("cpu")
        >>> pipeline = TrainPipelineExFM(model, torch.optim.Adam(model.parameters()), device,
        ...     teacher=lambda batch: TeacherOutputs(torch.zeros(len(batch.labels))))
        >>> metrics = ExFMMetrics(batch_size=8, device=device)
        >>> batches = iter(RandomRecDataset(["f"], 8, hash_size=10, num_dense=3, num_batches=20))
        >>> with RunMonitor(pipeline, metrics, total_examples=160, progress=False) as monitor:
        ...     for _ in range(20):
        ...         monitor.step(pipeline.progress(batches))
        >>> monitor.last["coverage/teacher/label"]
        1.0
        >>> sorted(monitor.last)
        ['auc/label', 'calibration/label', 'coverage/teacher/label', 'distillation_loss/teacher',
        'examples_per_second', 'ne/label', 'student_loss', 'teacher_failures']
    """

    def __init__(
        self,
        pipeline: ExFMSteps[Any, Any],
        metrics: ExFMMetrics,
        *,
        folder: Path | str | None = None,
        total_examples: int | None = None,
        start_examples: int | None = None,
        every_steps: int = 100,
        progress: bool = True,
    ) -> None:
        _check_kind("pipeline", pipeline, ExFMSteps)
        _check_kind("metrics", metrics, ExFMMetrics)
        _check_number("every_steps", every_steps, 1)
        if start_examples is not None:
            _check_number("start_examples", start_examples, 0)
        if total_examples is not None:
            _check_number("total_examples", total_examples, start_examples or 0)
        self.last: dict[str, float] = {}
        self._pipeline = pipeline
        self._metrics = metrics
        self._wrapper = find_wrapper(pipeline.model)
        self._terms = _Terms(self._wrapper.auxiliary_head)
        self._every_steps = every_steps
        self._start = start_examples
        self._own_start: int | None = None  # what the metrics of this rank had counted
        self._examples: int | None = None  # of all ranks, at the last writing
        self._own_examples = 0  # of this rank, since then
        self._rows: list[Tensor] = []  # of each step since then
        self._folder = None if folder is None else Path(folder)
        self._writer: SummaryWriter | None = None
        if folder is not None:
            on_rank_0(lambda: _check_folder(Path(folder)))  # its failure is that of every rank
        self._bar: tqdm[Any] = tqdm(
            total=total_examples,
            desc="training",
            unit="ex",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
            miniters=1,  # it draws at most when there is news
            disable=not progress or rank() > 0,
        )
        self._since = perf_counter()

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._rows:  # a rank that failed would leave the others waiting
                self._write()
        finally:
            self.close()

    def step(self, output: Any) -> None:
        """Count a step, and write if it is time to; every rank calls it.

        Args:
            output: what ``progress`` has just returned, for the metrics' ``outputs``.

        Raises:
            RuntimeError: if the pipeline has made no step in training.
            ValueError: as of :meth:`ExFMMetrics.update`.
            TypeError: as of :meth:`ExFMMetrics.update`.
        """
        losses, teacher = self._wrapper.last_losses, self._wrapper.last_teacher
        if losses is None or teacher is None:
            raise RuntimeError(
                "step should be given what the pipeline's progress has returned in training; the "
                "pipeline has made no such step: is it another one's output?"
            )
        if self._own_start is None:
            self._own_start = self._metrics.own_examples()
        counted = self._metrics._step_output(output)
        self._metrics.update(counted, teacher)
        there = teacher.presence.any(0).flatten()  # (M T,)
        self._rows.append(torch.cat([counted.loss.detach().reshape(1), losses, there]))
        self._own_examples += len(counted.logits)
        if len(self._rows) == self._every_steps:
            self._write()

    def close(self) -> None:
        """End the line and the file; what was not written yet is left out."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        lookup = _lookup_counters(self._pipeline, self._terms.head.teachers)
        counts = [self._own_examples, self._own_start or 0, self._pipeline.teacher_failures]
        rows, totals = self._over_ranks(torch.stack(self._rows), [*counts, *lookup.values()])
        examples, start, failures, *of_lookup = totals
        now = perf_counter()  # the device has caught up
        self.last = {
            **self._metrics.compute(),
            **self._terms.losses(rows),
            **self._terms.leads(),
            "teacher_failures": failures,
            **dict(zip(lookup, of_lookup, strict=True)),
            "examples_per_second": examples / (now - self._since),
        }
        self._since, self._rows, self._own_examples = now, [], 0
        if self._examples is None:
            self._begin(int(start) if self._start is None else self._start)
        self._examples = (self._examples or 0) + int(examples)
        if self._writer is not None:
            for name, value in self.last.items():
                self._writer.add_scalar(name, value, self._examples)
            self._writer.flush()
        self._bar.set_postfix(_in_short(self.last), refresh=False)
        self._bar.update(int(examples))

    def _begin(self, examples: int) -> None:
        """Of all ranks, where the curves begin or go on."""
        self._examples = examples
        bar = self._bar
        bar.initial = bar.n = bar.last_print_n = examples  # so that the rate is of this run
        if self._folder is not None and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=examples + 1)

    def _over_ranks(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[float]]:
        """The mean of the rows (S, ...) over the ranks, on the host, and the sums of the counts."""
        own = torch.tensor(counts, dtype=torch.float64, device=rows.device)
        sums = torch.cat([rows.double().flatten(), own])
        if world_size() > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        return sums[: rows.numel()].view_as(rows) / world_size(), sums[rows.numel() :].tolist()


class _Terms:
    """The terms by the names of their curves."""

    def __init__(self, head: AuxiliaryHead) -> None:
        self.head = head
        self._losses = _distinct([f"distillation_loss/{term.name}" for term in head.terms])
        columns = [(term, task) for term in head.terms for task in term.tasks or head.task_names]
        self._leads = _distinct(
            [
                "/".join(["lead", term.teacher, *["adapted"] * term.adapted, "serving", task])
                for term, task in columns
                if term.margin is not None
            ]
        )
        self._with_margin = [term.margin is not None for term, _ in columns]

    def losses(self, rows: Tensor) -> dict[str, float]:
        """Means of the steps' losses, from (S, 1 + K + M T): student's, terms', what was there."""
        head = self.head
        student, of_terms, there = rows.split(
            [1, len(head.terms), len(head.teachers) * len(head.tasks)], dim=1
        )
        there = there.view(len(rows), len(head.teachers), len(head.tasks)) > 0
        means = {"student_loss": float(student.mean())}
        for k, (name, term) in enumerate(zip(self._losses, head.terms, strict=True)):
            tasks = [head.task_names.index(task) for task in term.tasks or head.task_names]
            counted = there[:, head.teachers.index(term.teacher), tasks].any(-1)
            if counted.any():
                means[name] = float(of_terms[counted, k].mean())
        return means

    def leads(self) -> dict[str, float]:
        """Of the terms with a margin, as they are now."""
        values = itertools.compress(self.head.leads.tolist(), self._with_margin)
        return dict(zip(self._leads, values, strict=True))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with their position behind those that are not the only ones."""
    times = Counter(names)
    return [name if times[name] == 1 else f"{name}#{at}" for at, name in enumerate(names)]


def _lookup_counters(pipeline: ExFMSteps[Any, Any], teachers: Sequence[str]) -> dict[str, int]:
    """What a look-up has counted on this rank, by the names of the wrapper's teachers."""
    loaded = sys.modules.get("torchrec_exfm.das.lookup")  # by whoever has made a look-up
    if loaded is None or not isinstance(pipeline.teacher, loaded.TeacherLookup):
        return {}
    counters = pipeline.teacher.counters.values()
    return {
        f"lookup/{teacher}/{name}": getattr(of_teacher, name)
        for teacher, of_teacher in zip(teachers, counters, strict=True)
        for name in _OF_LOOKUPS
    }


def _check_folder(folder: Path) -> None:
    """Whether there is TensorBoard, and a folder that it can write to."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the curves in {str(folder)!r} need TensorBoard, which can't be imported ({error}): "
            "pip install 'torchrec-exfm[tensorboard]', or pass folder=None for the console alone"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)


def _in_short(scalars: Mapping[str, float]) -> dict[str, str]:
    """What the line shows; with its task and teacher only where there are several."""
    parts = {name: name.partition("/")[::2] for name in scalars}
    times = Counter(kind for kind, _ in parts.values())
    return {
        _ON_THE_LINE[kind] + (f"/{of}" if times[kind] > 1 else ""): f"{scalars[name]:.4f}"
        for name, (kind, of) in parts.items()
        if kind in _ON_THE_LINE
    }


def _check_kind(what: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} should be of {kind.__name__}; received {type(value).__name__}")


def _check_number(what: str, value: int, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{what} should be a whole number; received {value!r}")
    if value < least:
        raise ValueError(f"{what} should be at least {least}; received {value}")

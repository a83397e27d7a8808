"""The progress of a training, for its operator: scalars, TensorBoard curves and a console line.

Shapes: M teachers, T tasks, K terms, S steps between two writings.
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
_LOOKUP_COUNTERS = ("missing", "stale", "quarantined", "late")  # the metrics have coverage, age
_LOG_SECONDS = 30.0  # between two console lines that go to a file


class RunMonitor:
    """Updates the metrics at each step, and reports every few steps how the training goes.

    The scalars, by tag, on TensorBoard over the number of examples that all ranks have seen:

    * the metrics of :class:`~torchrec_exfm.ExFMMetrics`, under their own names;
    * ``student_loss``, the student's own; ``distillation_loss/TERM``, unweighted; with a student
      adapter ``adapter_loss``, L_SA before its step. Each is a mean over the ranks and the steps
      since the last writing. Steps without an output for the term, or without a labelled one for
      the adapter, do not count. Terms of one name are told apart by position: ``teacher#1``;
    * ``lead/TEACHER/adapted/serving/TASK`` for terms with a margin, in [0, 1]: the current factor
      of the term's loss on that task (``adapted`` only if the term is);
    * ``teacher_failures``, the batches that a teacher failed for, and for a ``TeacherLookup``
      ``lookup/TEACHER/missing``, ``stale``, ``quarantined`` and ``late``: sums over the ranks,
      since the pipeline and the look-up were made;
    * ``examples_per_second`` of all ranks, by the wall clock since the last writing.

    The console line shows progress, the time left, and NE, AUC, calibration and coverage. It names
    task and teacher where there are several.

    Every rank makes one with the same arguments, and calls ``step`` after each ``progress``. Rank 0
    writes. Between two writings a step costs the metrics' update, and one small tensor that stays
    on the device: nothing waits for it. As a context manager it writes the remaining steps at the
    end. If an exception ends the block, it only closes the file.

    Args:
        pipeline: the run's pipeline.
        metrics: for the same tasks and teachers; let only this monitor update it.
        folder: the run's TensorBoard folder; needs ``pip install 'torchrec-exfm[tensorboard]'``.
            None: no curves.
        total_examples: of all ranks in the whole run, for the time left; None: unknown.
        start_examples: of all ranks, before the first step. None: the metrics' count, so that a
            resumed run continues its curves if the metrics were saved and restored with it.
            What an earlier run wrote to the folder beyond that point is hidden.
        every_steps: steps from one writing to the next. Each writing computes the metrics over all
            ranks, and sorts the window of the AUC.
        progress: False for no console line.

    Attributes:
        last: the scalars of the last writing, by tag; on every rank, with or without a folder.

    Raises:
        ValueError: for a number that is too small.
        TypeError: for a pipeline, metrics or number of the wrong type.
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
        >>> sorted(monitor.scalars())
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
        self._start_examples = start_examples
        self._rank_start: int | None = None  # what this rank's metrics had counted before
        self._examples: int | None = None  # of all ranks, at the last writing
        self._rank_examples = 0  # of this rank, since then
        self._rows: list[Tensor] = []  # one a step since then, see _Terms.losses
        self._folder = None if folder is None else Path(folder)
        self._writer: SummaryWriter | None = None
        pipeline._steps.keep_adapter_loss = True
        if folder is not None:
            # Every rank raises the error of rank 0: else the others would hang in a writing.
            on_rank_0(lambda: _check_folder(Path(folder)))
        self._bar: tqdm[Any] = tqdm(
            total=total_examples,
            desc="training",
            unit="ex",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
            miniters=1,  # redraw only after an update: tqdm's own guess would skip writings
            disable=not progress or rank() > 0,
        )
        self._since = perf_counter()

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After an error only some ranks may be here, and a writing is collective.
            if kind is None and self._rows:
                self._write()
        finally:
            self.close()

    def step(self, output: Any) -> None:
        """Count a step, and write every ``every_steps`` steps; every rank must call it.

        Args:
            output: what ``progress`` has just returned, for the metrics' ``outputs``.

        Raises:
            RuntimeError: if the pipeline has made no training step.
            ValueError: see :meth:`ExFMMetrics.update`.
            TypeError: see :meth:`ExFMMetrics.update`.
        """
        losses, teacher = self._wrapper.last_losses, self._wrapper.last_teacher
        if losses is None or teacher is None:
            raise RuntimeError(
                "step should be given what the pipeline's progress has returned in training; the "
                "pipeline has made no such step: is it another one's output?"
            )
        if self._rank_start is None:
            # Not in __init__: metrics may be restored after the monitor was made.
            self._rank_start = self._metrics.own_examples()
        counted = self._metrics._step_output(output)
        self._metrics.update(counted, teacher)
        presence, adapter_loss = teacher.presence.any(0), self._pipeline._steps.adapter_loss
        parts = [counted.loss.detach(), losses, presence]
        parts += [] if adapter_loss is None else [adapter_loss]
        self._rows.append(torch.cat([part.flatten() for part in parts]))
        self._rank_examples += len(counted.logits)
        if len(self._rows) == self._every_steps:
            self._write()

    def scalars(self) -> dict[str, float]:
        """Return the newest scalars by tag, for any experiment tracker; TensorBoard gets the same.

        They are those of the last writing, as a copy, and empty before the first. The call computes
        nothing and waits for nothing, neither the device nor another rank: any rank may make it,
        alone and at any time. All ranks get the same values, up to ``examples_per_second``, which
        each takes from its own clock.
        """
        return dict(self.last)

    @property
    def examples(self) -> int:
        """The x-axis of the curves, in examples of all ranks up to the last writing."""
        return self._examples or 0

    def close(self) -> None:
        """Close the console line and the file, without writing the remaining steps."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        lookup = _lookup_counters(self._pipeline, self._terms.head.teachers)
        counts = [self._rank_examples, self._rank_start or 0, self._pipeline.teacher_failures]
        rows, totals = self._reduce(torch.stack(self._rows), [*counts, *lookup.values()])
        examples, start, failures, *lookup_totals = totals
        now = perf_counter()  # here, as the copy to the host has waited for the steps' kernels
        self.last = {
            **self._metrics.compute(),
            **self._terms.losses(rows),
            **self._terms.leads(),
            "teacher_failures": failures,
            **dict(zip(lookup, lookup_totals, strict=True)),
            "examples_per_second": examples / (now - self._since),
        }
        self._since, self._rows, self._rank_examples = now, [], 0
        if self._examples is None:
            self._begin(int(start) if self._start_examples is None else self._start_examples)
        self._examples = self.examples + int(examples)
        if self._writer is not None:
            for tag, value in self.scalars().items():
                self._writer.add_scalar(tag, value, self._examples)
            self._writer.flush()  # a killed run keeps its curves: the writer's own is every 2 min
        self._bar.set_postfix(_line_values(self.last), refresh=False)
        self._bar.update(int(examples))

    def _begin(self, examples: int) -> None:
        """Start line and curves after this many examples of all ranks."""
        self._examples = examples
        bar = self._bar
        bar.initial = bar.n = bar.last_print_n = examples  # tqdm's rate then counts this run alone
        if self._folder is not None and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=examples + 1)

    def _reduce(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[float]]:
        """Return the rows (S, ...) averaged over the ranks, on the host, and summed counts."""
        # In one float64 buffer: one all-reduce, one copy, and counts exact up to 2**53.
        rank_counts = torch.tensor(counts, dtype=torch.float64, device=rows.device)
        sums = torch.cat([rows.double().flatten(), rank_counts])
        if world_size() > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        return sums[: rows.numel()].view_as(rows) / world_size(), sums[rows.numel() :].tolist()


class _Terms:
    """The tags of the terms' losses and leads."""

    def __init__(self, head: AuxiliaryHead) -> None:
        self.head = head
        self._loss_tags = _number_duplicates(
            [f"distillation_loss/{term.name}" for term in head.terms]
        )
        columns = [(term, task) for term in head.terms for task in term.tasks or head.task_names]
        self._lead_tags = _number_duplicates(
            [
                "/".join(["lead", term.teacher, *["adapted"] * term.adapted, "serving", task])
                for term, task in columns
                if term.margin is not None
            ]
        )
        self._with_margin = [term.margin is not None for term, _ in columns]

    def losses(self, rows: Tensor) -> dict[str, float]:
        """Return means over the steps, by tag.

        Args:
            rows: (S, 1 + K + M T) or, with an adapter, (S, 1 + K + M T + 2): the student's loss,
                the terms', which outputs had any example (averaged over ranks), the adapter's,
                whether it had any label.
        """
        head = self.head
        sizes = [1, len(head.terms), len(head.teachers) * len(head.tasks)]
        student, losses, shares, adapter = rows.split([*sizes, rows.shape[1] - sum(sizes)], dim=1)
        presence = shares.view(len(rows), len(head.teachers), len(head.tasks)) > 0
        means = {"student_loss": float(student.mean())}
        for k, (tag, term) in enumerate(zip(self._loss_tags, head.terms, strict=True)):
            tasks = [head.task_names.index(task) for task in term.tasks or head.task_names]
            counted = presence[:, head.teachers.index(term.teacher), tasks].any(-1)
            if counted.any():
                means[tag] = float(losses[counted, k].mean())
        labeled = adapter[(adapter[:, 1:] > 0).all(1)]
        if labeled.numel():
            means["adapter_loss"] = float(labeled[:, 0].mean())
        return means

    def leads(self) -> dict[str, float]:
        """Return the current leads of the terms with a margin, by tag."""
        values = itertools.compress(self.head.leads.tolist(), self._with_margin)
        return dict(zip(self._lead_tags, values, strict=True))


def _number_duplicates(tags: Sequence[str]) -> list[str]:
    """Append its position to each tag that occurs more than once."""
    times = Counter(tags)
    return [tag if times[tag] == 1 else f"{tag}#{at}" for at, tag in enumerate(tags)]


def _lookup_counters(pipeline: ExFMSteps[Any, Any], teachers: Sequence[str]) -> dict[str, int]:
    """Return a look-up's counters on this rank by tag, with the wrapper's names of teachers."""
    # Not imported: das needs optional packages, and whoever has a look-up has loaded the module.
    module = sys.modules.get("torchrec_exfm.das.lookup")
    if module is None or not isinstance(pipeline.teacher, module.TeacherLookup):
        return {}
    return {
        f"lookup/{teacher}/{name}": getattr(counters, name)
        for teacher, counters in zip(teachers, pipeline.teacher.counters.values(), strict=True)
        for name in _LOOKUP_COUNTERS
    }


def _check_folder(folder: Path) -> None:
    """Raise unless TensorBoard can be imported; make the folder."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the curves in {str(folder)!r} need TensorBoard, which can't be imported ({error}): "
            "pip install 'torchrec-exfm[tensorboard]', or pass folder=None for the console alone"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)


def _line_values(scalars: Mapping[str, float]) -> dict[str, str]:
    """Return what the line shows, with the task and teacher only where there are several."""
    parts = {tag: tag.partition("/")[::2] for tag in scalars}
    times = Counter(kind for kind, _ in parts.values())
    return {
        _ON_THE_LINE[kind] + (f"/{owner}" if times[kind] > 1 else ""): f"{scalars[tag]:.4f}"
        for tag, (kind, owner) in parts.items()
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

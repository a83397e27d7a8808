"""Train pipelines that bring teacher outputs to the step: they order the work, without formulas."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipeline
from torchrec.streamable import Pipelineable

from torchrec_exfm._checks import (
    check_adapter,
    check_features,
    check_keys,
    check_on_error,
    check_teacher,
    warn_if_heads_untrained,
    warn_if_tables_unsharded,
)
from torchrec_exfm._compat import (
    TrainPipelineSparseDist,
    data_parallel_group,
    pipeline_parts,
    pipelined_names,
    sharded_names,
)
from torchrec_exfm._warnings import NotPipelinedWarning
from torchrec_exfm.adapter import StudentAdapter
from torchrec_exfm.batch import TeacherOutputs
from torchrec_exfm.sources import MaskedErrors, TeacherSource, as_source
from torchrec_exfm.steps import Feed, Steps, read_labels
from torchrec_exfm.wrapper import find_wrapper

__all__ = ["ExFMSteps", "TrainPipelineExFM"]

In = TypeVar("In", bound=Pipelineable)  # the user's batch
Out = TypeVar("Out")  # what the student returns after the loss


class ExFMSteps(TrainPipeline[In, Out]):
    """A mixin that adds external distillation to any TorchRec train pipeline (arXiv 2502.17494).

    ``class Mine(ExFMSteps, PrefetchTrainPipelineSparseDist): pass`` is that pipeline with teacher
    outputs, whatever it overlaps. It wraps the iterator passed to ``progress``, so that each batch
    carries its outputs, or a future of them. The rest of Algorithm 1 happens in the forward of
    :class:`ExFMWrapper`:

    1. The outputs are resolved. Counting them over the ranks overlaps the student's forward.
    2. The student adapter takes its step on the labels and returns its outputs without gradient.
    3. The heads run, and one backward follows.

    With several ranks, the means of the losses are over the examples of all ranks. This takes a
    small all-reduce for the counts, one for the adapter's gradients, and one that overlaps backward
    for the running means of terms with a margin.

    Everything else is TorchRec's: ``progress(dataloader_iter)`` returns the student's own
    ``(loss, logits, labels)``, computed before the step's update.

    Args:
        model: an ``ExFMWrapper`` under ``DistributedModelParallel`` (or DDP, or alone).
        optimizer: over the model's dense parameters, including those of the heads.
        device: where the step runs.
        *args: further positional options of TorchRec's pipeline.
        teacher: the source of the outputs. None: the data loader yields ``ExFMBatch``. A function
            of the user's batch, called on the host when it is loaded: for outputs logged as columns
            of the data. Or a :class:`TeacherSource`, with its one method ``start(batch)``: a
            ``torchrec_exfm.das.TeacherLookup``, started when the batch is loaded and awaited when
            its step starts; a :class:`LiveTeacher`; or your own.
        on_teacher_error: ``"raise"``, or ``"mask"``: if the outputs are unavailable (the store is
            gone, a window is damaged: OSError and RuntimeError), training goes on without them, as
            the student alone. The pipeline warns once, counts such batches in ``teacher_failures``,
            and tries again half a minute later. Not for a live teacher, whose ranks must fail
            together.
        adapter: re-calibrates the outputs; needed by terms with ``adapted=True``.
        adapter_optimizer: over the adapter's parameters; None: fused Adam, learning rate 1e-2.
        labels: a function from the user's batch to its labels, (B,) or (B, T), NaN where one is
            missing: for the adapter, for terms with a margin, and for B if the teacher failed.
        weights: a function from the user's batch to its examples' weights, (B,) or per task (B, T),
            in the means of terms, adapter and margins (not in the student's own loss). None: all 1.
        groups: a function from the user's batch to (B,) int64 ids, equal for the examples of a
            request, page or session, in any order; needed by terms whose loss compares them. Each
            rank forms its own groups: one spread over two ranks counts as two.
        candidates: a function from the user's batch to its items' ids, (B,) int64, or to a pair of
            them and (B,) log q, how often an item is sampled; needed by losses over in-batch
            candidates, which are those of a rank's batch.
        trace: False for a model that can't be traced: then only the copies are pipelined, as in
            ``TrainPipelineBase``.
        **kwargs: keyword options of TorchRec's pipeline.

    Attributes:
        teacher: as given.
        adapter: as given, on the device.
        adapter_optimizer: as given, or the default one; None without an adapter.

    Raises:
        ValueError: if the model holds no ExFMWrapper; if the terms do not fit the adapter, or the
            look-up's teachers and tasks do not fit the model; for terms that need ``groups`` or
            ``candidates`` without them; for ``free_features_storage_early`` with a live teacher;
            for ``on_teacher_error="mask"`` with a live teacher or no teacher. In ``progress``, if
            a function does not fit the batch, or its result does not fit the outputs; for outputs
            without embeddings that a term needs; on the CPU for infinite labels and negative
            weights.
        TypeError: for a teacher of another type. In ``progress``, if there are both a teacher and
            ``ExFMBatch`` from the loader, or neither.
        RuntimeError: in the first ``progress``, if the model can't be traced.

    Warns:
        NotPipelinedWarning: if embeddings are not pipelined, or not sharded.
        TeacherMissingWarning: at the first failure of a masked teacher.
        DistillationWarning: if the model is sharded over ranks that do not average gradients; if
            the optimizer misses the heads' parameters; if the first outputs of a binary task look
            like probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *args: Any,
        teacher: Callable[[Any], TeacherOutputs] | TeacherSource | None = None,
        on_teacher_error: Literal["raise", "mask"] = "raise",
        adapter: StudentAdapter | None = None,
        adapter_optimizer: torch.optim.Optimizer | None = None,
        labels: Callable[[Any], Tensor] = operator.attrgetter("labels"),
        weights: Callable[[Any], Tensor] | None = None,
        groups: Callable[[Any], Tensor] | None = None,
        candidates: Callable[[Any], Any] | None = None,
        trace: bool = True,
        **kwargs: Any,
    ) -> None:
        head = find_wrapper(model).auxiliary_head
        check_teacher(teacher, head, model)
        check_on_error(on_teacher_error, teacher)
        check_adapter(head, adapter, adapter_optimizer)
        check_keys(head, groups, candidates)
        pipeline: Any = super()
        pipeline.__init__(model, optimizer, device, *args, **kwargs)
        check_features(teacher, self)
        warn_if_tables_unsharded(model)
        warn_if_heads_untrained(optimizer, head)
        self.teacher = teacher
        group = data_parallel_group(model)
        self.adapter = None if adapter is None else _on_device(adapter, device, group)
        self.adapter_optimizer = adapter_optimizer
        if self.adapter is not None and adapter_optimizer is None:
            parameters = self.adapter.parameters()
            self.adapter_optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)
        source = as_source(teacher)
        self._masked: MaskedErrors | None = None
        if on_teacher_error == "mask":
            shape = len(head.teachers), len(head.tasks)
            source = self._masked = MaskedErrors(
                source, lambda batch: len(read_labels(labels, batch)), shape
            )
        self._steps = Steps(
            head,
            source,
            self.adapter,
            self.adapter_optimizer,
            labels=labels,
            weights=weights,
            groups=groups,
            candidates=candidates,
            group=group,
            device=device,
        )
        self._feed: Feed | None = None
        self._trace = trace
        self._warned = False

    def progress(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, as TorchRec's pipeline does."""
        pipeline: Any = super()
        self._steps.started = False
        outputs = pipeline.progress(self._as_feed(dataloader_iter), *args, **kwargs)
        self._steps.finish()
        return outputs

    def fill_pipeline(self, dataloader_iter: Iterator[Any]) -> None:
        """Load the first batches, which TorchRec's pipeline otherwise does in the first step."""
        pipeline: Any = super()
        pipeline.fill_pipeline(self._as_feed(dataloader_iter))

    @property
    def teacher_failures(self) -> int:
        """The number of this rank's batches that lacked teacher outputs after a failure."""
        return 0 if self._masked is None else self._masked.failures

    @property
    def model(self) -> nn.Module:
        """The model that is trained, as TorchRec's pipeline holds it."""
        return pipeline_parts(self).model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the dense parameters."""
        return pipeline_parts(self).optimizer

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return pipeline_parts(self).device

    def _as_feed(self, batches: Iterator[Any]) -> Feed:
        """Return the iterator that makes each batch carry its outputs."""
        if isinstance(batches, Feed):
            return batches
        # The same Feed for the same iterator: TorchRec's pipelines recognize a new one by identity.
        if self._feed is None or self._feed.batches is not batches:
            self._feed = Feed(batches, self._steps)
        return self._feed

    def _pipeline_model(
        self, batch: Any, context: Any, pipelined_forward: Any = None, **kwargs: Any
    ) -> None:
        pipeline: Any = super()
        if not self._trace or not sharded_names(self.model):
            # Called for its wait for the batch's copy: with no module pipelined it does no more.
            pipeline.start_sparse_data_dist(batch, context)
            return
        try:
            pipeline._pipeline_model(batch, context, pipelined_forward, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"the model can't be pipelined ({type(error).__name__}: {error}); if its forward "
                "can't be traced, move what depends on tensors' values into a submodule without "
                "tables, or pass trace=False to train with the embeddings not pipelined"
            ) from error
        self._warn_if_not_pipelined()

    def _warn_if_not_pipelined(self) -> None:
        pipelined = pipelined_names(cast(Any, self), self.model)
        missed = [name for name in sharded_names(self.model) if name not in pipelined]
        if missed and not self._warned:
            self._warned = True
            warnings.warn(
                f"the embeddings {missed} are NOT pipelined: their input is changed on its way "
                "from the batch to them; training is correct but slower; move the change into the "
                "data loader, or see pipeline_postproc of TrainPipelineSparseDist",
                NotPipelinedWarning,
                stacklevel=2,
            )


class TrainPipelineExFM(ExFMSteps[In, Out], TrainPipelineSparseDist[In, Out]):
    """``TrainPipelineSparseDist`` with external distillation: see :class:`ExFMSteps`."""


def _on_device(
    adapter: StudentAdapter, device: torch.device, group: dist.ProcessGroup | None
) -> StudentAdapter:
    """Move an adapter to the device, with rank 0's parameters on every rank."""
    adapter = adapter.to(device)
    if group is not None:
        for parameter in adapter.parameters():
            dist.broadcast(parameter.detach(), group=group, group_src=0)
    return adapter

"""Checks of ``ExFMSteps`` before other train pipelines, each run by every rank of one or two."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import rank_checks as checks
import rank_models as rm
import torch
from ranks import device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.train_pipeline import (
    TorchCompileConfig,
    TrainPipelineBase,
    TrainPipelinePT2,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite

from torchrec_exfm import (
    DistillationTerm,
    ExFMSteps,
    TeacherMissingWarning,
    TeacherOutputs,
)
from torchrec_exfm import sources as exfm_sources
from torchrec_exfm._ranks import gather_from_ranks
from torchrec_exfm.wrapper import find_wrapper


class Clipping(TrainPipelineSparseDist[Any, Any]):
    """A user's own pipeline: gradients are clipped, and the last loss is kept."""

    last_loss: Tensor | None = None

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        output = super().progress(dataloader_iter)
        self.last_loss = output[0]
        return output

    def _backward(self, losses: Tensor) -> None:
        super()._backward(losses)
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)


BASES: dict[str, type[Any]] = {
    "base": TrainPipelineBase,
    "sparse_dist": TrainPipelineSparseDist,
    "lite": TrainPipelineSparseDistLite,
    "own": Clipping,
    "compiled": TrainPipelinePT2,
}


def mixed(base: type[Any]) -> type[Any]:
    """The mixin before a pipeline, as a user writes it."""

    class Mixed(ExFMSteps, base):  # type: ignore[misc, type-arg]
        pass

    return Mixed


def check_mixin_of_weight_zero_is_plain(rank: int, world_size: int, name: str) -> None:
    """With w = 0 and an adapter, the mixin equals the pipeline without it, to the bit."""
    terms = [
        DistillationTerm(weight=0.0),
        DistillationTerm(weight=0.0, adapted=True, serving=True, margin=0.5),
    ]
    base = BASES[name]
    checks.assert_weight_zero_is_plain(rank, world_size, "dlrm", terms, base, mixed(base))


def check_mixin_equals_train_pipeline_exfm(rank: int, world_size: int, name: str) -> None:
    """To the bit: heads, adapter, margins; from columns, and a look-up that fails now and then."""
    for fails_at in [()] if name == "compiled" else [(), (1, 4)]:
        run = ("margins", fails_at, rank, world_size)
        rm.assert_same(_trained(name, *run), _trained("sparse_dist", *run))


def _trained(
    name: str, kind: str, fails_at: Sequence[int], rank: int, world_size: int
) -> dict[str, Any]:
    terms = checks.TERMS[kind]
    trainee = rm.sharded(rm.wrapped(terms=terms), world_size)
    teacher = rm.teacher_for(terms)
    options: dict[str, Any] = {"teacher": teacher}
    if fails_at:
        look_up = LookUp(teacher, fails_at if rank == 0 else ())
        options = {"teacher": look_up, "on_teacher_error": "mask"}
    if name == "compiled":
        options["compile_configs"] = TorchCompileConfig(backend="eager", compile_on_iter=2)
    adapter = rm.two_task_adapter() if any(term.adapted for term in terms) else None
    model, optimizer = trainee
    pipeline = mixed(BASES[name])(model, optimizer, device(), adapter=adapter, **options)
    with warnings.catch_warnings(), mock.patch.object(exfm_sources, "RETRY_SECONDS", 0.0):
        warnings.simplefilter("ignore", TeacherMissingWarning)
        outputs = rm.drained(pipeline, rm.parts(rank, world_size))
    assert len(outputs) == 6
    return {
        "outputs": outputs,
        "model": rm.snapshot(model.state_dict()),
        "adapter": [] if adapter is None else [p.detach() for p in adapter.parameters()],
        "failures": torch.tensor(pipeline.teacher_failures),
    }


class Collectives(TorchDispatchMode):
    """Records the collectives that this rank issues, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self.order.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def check_collectives_do_not_depend_on_a_ranks_teacher(rank: int, world_size: int) -> None:
    """The order of collectives is the same on a rank whose teacher fails or has no output."""
    orders = []
    for fails_at in ((), (0, 1, 3, 5) if rank == 0 else ()):
        terms = checks.TERMS["margins"]
        trainee = rm.sharded(rm.wrapped(terms=terms), world_size)
        pipeline = rm.pipeline_of(
            trainee,
            teacher=LookUp(rm.informed, fails_at),
            on_teacher_error="mask",
            adapter=rm.two_task_adapter(),
        )
        with (
            warnings.catch_warnings(),
            mock.patch.object(exfm_sources, "RETRY_SECONDS", 0.0),
            Collectives() as issued,
        ):
            warnings.simplefilter("ignore", TeacherMissingWarning)
            rm.drained(pipeline, rm.parts(rank, world_size))
        assert pipeline.teacher_failures == len(fails_at)
        orders += gather_from_ranks(issued.order)
    assert all(order == orders[0] for order in orders)
    assert world_size == 1 or orders[0].count("allreduce_") >= 3 * 6


def check_two_forwards_of_a_batch(rank: int, world_size: int) -> None:
    """A second forward uses the first one's inputs; the running means are those of one rank."""
    terms = (DistillationTerm(teacher="a", serving=True, margin=1.5),)
    trainee = rm.sharded(rm.wrapped(terms=terms), world_size)
    head = find_wrapper(trainee.model).auxiliary_head
    seen = []

    def twice(batch: Any) -> Any:
        trainee.model(batch)
        seen.append(batch.step_inputs)
        output = trainee.model(batch)
        assert batch.step_inputs is seen[-1]
        return output

    pipeline = rm.pipeline_of(trainee, teacher=rm.informed, trace=False, custom_model_fwd=twice)
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    rm.drained(pipeline, 3 * rm.parts(rank, world_size))
    assert len(seen) == 18
    (means,) = head.lead_losses
    for other in rm.on_every_rank(means):
        rm.assert_same(other, means)
    assert float(means.min()) > 0 and float(means.max()) < 5


class LookUp:
    """Looks up outputs on a thread, and fails for some batches."""

    def __init__(self, function: Callable[[Any], TeacherOutputs], fails_at: Sequence[int]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._function, self._fails_at = function, fails_at
        self._asked = itertools.count()

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        return self._thread.submit(self._find, batch, next(self._asked))

    def _find(self, batch: Any, number: int) -> TeacherOutputs:
        if number in self._fails_at:
            raise ConnectionError("now and then")
        return self._function(batch)

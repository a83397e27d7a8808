"""The user's training module, wrapped: its own loss, plus what the teachers' heads add.

Shapes: B examples, D width of the shared representation, M teachers, T tasks, K terms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_exfm._compat import sharded_names
from torchrec_exfm._user import outline, read
from torchrec_exfm.auxiliary import AuxiliaryHead, ByTasks, by_tasks
from torchrec_exfm.batch import ExFMBatch, StepInputs, TeacherOutputs
from torchrec_exfm.tap import OutputsOf, Tap, remove_taps, tapped_module, tapped_names, tapped_width
from torchrec_exfm.tasks import Task, check_tasks, pick_columns
from torchrec_exfm.terms import DistillationTerm

__all__ = ["ExFMWrapper"]


class ExFMWrapper(nn.Module):
    """External distillation for any module with TorchRec's training contract.

    .. math:: L = L_{\\mathrm{student}} + \\sum_k w_k L_k

    The student's forward runs once, as it is; a hook reads the input of one of its submodules
    (the *tap*), the representation that serving head and distillation heads share. The student
    keeps its class, its names and its outputs. A tapped module that begins with an operation in
    place changes what the heads see as well. (arXiv 2502.17494, eq. 3-5.)

    Put the wrapper where the training module was: before ``apply_optimizer_in_backward``, the
    sharding plan and ``DistributedModelParallel``, whose names gain the prefix ``student.``.

    In training it takes an :class:`ExFMBatch` and returns ``(L, (loss, logits, labels))``, the
    second part being the student's own. In evaluation it takes the user's batch as well and
    returns what the student returns.

    Args:
        student: ``forward(batch) -> (loss, (loss, logits, labels))``, as ``DLRMTrain``. Only the
            loss has to be where it is: what comes second is passed on as it is.
        tap: the name, below ``student``, of the submodule whose first argument is the shared
            representation, (B, D): usually the one after the interaction, ``"model.over_arch"``
            in a ``DLRMTrain``. For terms with ``serving=True`` its output is the logits, (B, T).
            Where tasks have towers of their own, as under a shared bottom, MMoE or PLE: a mapping
            from each task, or a tuple of tasks that share one, to its tower,
            ``{"click": "towers.click", "buy": "towers.buy"}``. In the place of a name
            :class:`OutputsOf` several: what they return, side by side, is the representation; so
            for two towers, ``OutputsOf("query_tower", "item_tower")``.
        terms: what is distilled, see :class:`DistillationTerm`.
        teachers: the names of the M teachers, in the order of the outputs.
        tasks: the T tasks, in the order of the outputs and of the labels.
        in_features: D; None: that of the first ``nn.Linear`` in the tapped module (of the last of
            each, for ``OutputsOf``).
        serving_logits: takes what the student returns to its logits, (B, T) or (B,), with their
            gradient, for terms with ``serving=True``; None: they are the tapped module's output.

    Raises:
        ValueError: if ``tap`` is no submodule that can be tapped, or its width can't be told; for
            wrong terms; for a student that is sharded or wrapped already.
        TypeError: for terms or tasks of another kind.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        tap: str | OutputsOf | ByTasks[str | OutputsOf],
        terms: Sequence[DistillationTerm] = (DistillationTerm(),),
        teachers: Sequence[str] = ("teacher",),
        tasks: Sequence[Task] = (Task(),),
        in_features: int | None = None,
        serving_logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_bare(student)
        groups: list[tuple[tuple[str, ...], str | OutputsOf]]
        groups = by_tasks("tap", tap, check_tasks(tasks))
        modules = [
            [tapped_module(student, name) for name in tapped_names(where)] for _, where in groups
        ]
        widths: dict[str | tuple[str, ...], int] = {
            names: tapped_width(where, tapped) if in_features is None else in_features
            for (names, where), tapped in zip(groups, modules, strict=True)
        }
        with torch.random.fork_rng(devices=[]):  # the student's initialisation stays as it was
            heads = AuxiliaryHead(widths, terms=terms, teachers=teachers, tasks=tasks)
        weight = next(modules[0][0].parameters(), None)
        if weight is not None and not weight.is_meta:
            heads.to(device=weight.device, dtype=weight.dtype)
        remove_taps(student)
        self.bare_student = (_without_weights(student),)  # a tuple: no submodule, no state
        self.student = student
        keeps_output = serving_logits is None and any(term.serving for term in heads.terms)
        taps = []
        for (names, where), tapped in zip(groups, modules, strict=True):
            halves = any(
                term.loss.width == 0 and {*names} & {*(term.tasks or names)} for term in heads.terms
            )
            options = {"keeps_output": keeps_output, "halves": halves}
            taps.append(Tap(where, tapped, widths[names], names, **options))
        self.exfm = _Supervision(heads, taps, serving_logits)

    def forward(self, batch: Any) -> Any:
        """See the class.

        Raises:
            TypeError: in training, for a batch that is no ExFMBatch, or a student whose outputs are
                not of the contract.
            RuntimeError: in training, if a tapped module does not run exactly once.
            ValueError: in training, if a tapped module's input is not (B, D), or what the terms
                need is missing or of another shape.

        Warns:
            DistillationWarning: if a tapped module's input or output carries no gradient.
        """
        carries_outputs = isinstance(batch, ExFMBatch)
        inputs = batch.start_step() if carries_outputs and self.training else None
        for tap in self.exfm.taps:
            tap.open()
        try:
            outputs = self.student(batch.batch if carries_outputs else batch)
            return self.exfm(outputs, batch, inputs) if self.training else outputs
        finally:
            for tap in self.exfm.taps:
                tap.clear()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            student = self.__dict__.get("_modules", {}).get("student")
            if name.startswith("__") or not hasattr(student, name):
                raise
            raise AttributeError(f"{error}: the student's own is .student.{name}") from None

    @property
    def auxiliary_head(self) -> AuxiliaryHead:
        """The heads; their keys begin with ``exfm.``."""
        return self.exfm.auxiliary_head

    @property
    def last_losses(self) -> Tensor | None:
        """(K,), the terms' unweighted losses of the last training forward, detached."""
        return self.exfm.last_losses

    @property
    def last_teacher(self) -> TeacherOutputs | None:
        """The teachers' outputs in the last training forward."""
        return self.exfm.last_teacher


def find_wrapper(model: nn.Module) -> ExFMWrapper:
    """The ExFMWrapper in a model, however deep DMP and DDP have wrapped it.

    Raises:
        ValueError: if there is none.
    """
    wrapper = wrapper_in(model)
    if wrapper is None:
        raise ValueError(
            f"the model should hold an ExFMWrapper; received {type(model).__name__} without one: "
            "wrap the training module before DistributedModelParallel"
        )
    return wrapper


def wrapper_in(model: nn.Module) -> ExFMWrapper | None:
    """As :func:`find_wrapper`; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, ExFMWrapper)), None)


class _Supervision(nn.Module):
    """Adds the heads' loss to the student's: a leaf of the pipeline's tracing, run as it is."""

    def __init__(
        self,
        auxiliary_head: AuxiliaryHead,
        taps: Sequence[Tap],
        serving_logits: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__()
        self.auxiliary_head = auxiliary_head
        self.taps = tuple(taps)
        self.serving_logits = serving_logits
        self.last_losses: Tensor | None = None
        self.last_teacher: TeacherOutputs | None = None

    def forward(
        self, outputs: Any, batch: Any, inputs: Callable[[], StepInputs] | None
    ) -> tuple[Tensor, Any]:
        if inputs is None:
            raise TypeError(
                f"training should be given an ExFMBatch; received {type(batch).__name__}: let "
                "TrainPipelineExFM make it, or build ExFMBatch(batch, TeacherOutputs(...))"
            )
        loss, rest = _checked_contract(outputs)
        has_heads = not all(term.serving for term in self.auxiliary_head.terms)
        shared = [tap.take_input(learns=has_heads) for tap in self.taps]
        serving, step_inputs = self._serving(outputs), inputs()
        added, self.last_losses = self.auxiliary_head(shared, serving=serving, **vars(step_inputs))
        batch.end_step(step_inputs)
        self.last_teacher = step_inputs.teacher
        return loss + added, rest

    def _serving(self, outputs: Any) -> Any:
        """The serving head's logits, (B, T); None where no term needs them."""
        if not any(term.serving for term in self.auxiliary_head.terms):
            return None
        if self.serving_logits is not None:
            return self._told_logits(outputs)
        logits = [tap.take_output() for tap in self.taps]
        names = [name for tap in self.taps for name in tap.tasks]
        order = [names.index(name) for name in self.auxiliary_head.task_names]
        return pick_columns(logits[0] if len(logits) == 1 else torch.cat(logits, dim=1), order)

    def _told_logits(self, outputs: Any) -> Tensor:
        assert self.serving_logits is not None
        what = "what the student returns to its logits"
        logits: Tensor = read("serving_logits", self.serving_logits, outputs, "ExFMWrapper", what)
        if torch.is_grad_enabled() and isinstance(logits, Tensor) and not logits.requires_grad:
            raise ValueError(
                "serving_logits should give logits with their gradient, which terms with "
                "serving=True send to the serving head; received some without: return them from "
                "the student's forward without .detach(), or tap the module that computes them"
            )
        return logits


def _check_bare(student: nn.Module) -> None:
    if wrapper_in(student) is not None:
        raise ValueError(
            f"the student should not be wrapped yet; received {type(student).__name__} that is or "
            "holds an ExFMWrapper, as when a notebook's cell is run again: wrap its .student"
        )
    if sharded_names(student):
        raise ValueError(
            f"the student should not be sharded yet; received {type(student).__name__} with "
            f"the sharded {sharded_names(student)}: wrap it before DistributedModelParallel"
        )


def _checked_contract(outputs: Any) -> tuple[Tensor, Any]:
    if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
        loss = outputs[0]
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss, outputs[1]
    raise TypeError(
        "the student's forward should return (loss, (loss, logits, labels)) with a loss of one "
        f"element, as torchrec.models.dlrm.DLRMTrain; received {outline(outputs)}"
    )


def _without_weights(module: nn.Module) -> nn.Module | Exception:
    """A copy of a module whose parameters are on the meta device, or why there can be none."""
    weights = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    try:
        bare: nn.Module = copy.deepcopy(module, weights)
    except Exception as error:  # whatever the user's attributes raise; told at export
        return error
    return bare

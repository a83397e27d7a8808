"""The wrapper around a user's training module: it adds the distillation loss to the module's own.

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
    """A wrapper that adds external distillation to a module with TorchRec's training contract.

    .. math:: L = L_{\\mathrm{student}} + \\sum_k w_k L_k

    The student's forward runs once, unchanged. A hook reads the input of one of its submodules
    (the *tap*): the representation that the serving head and the distillation heads share. The
    student keeps its class, its names and its outputs. If the tapped module begins with an in-place
    operation, the heads see its result. (arXiv 2502.17494, eq. 3-5.)

    Wrap the training module before the sharding plan, ``DistributedModelParallel`` and the dense
    optimizer are made, since names gain the prefix ``student.``. ``apply_optimizer_in_backward``
    on the tables may come before or after.

    In training, call it on an :class:`ExFMBatch`. It returns ``(L, (loss, logits, labels))``; the
    second part is the student's own. In evaluation, it also accepts the user's batch, and it
    returns what the student returns.

    Args:
        student: ``forward(batch) -> (loss, (loss, logits, labels))``, as ``DLRMTrain``. Only the
            loss is read; the second part is returned unchanged.
        tap: the name, below ``student``, of the submodule whose first argument is the shared
            representation, (B, D): usually the last layer, ``"model.over_arch.model.1"`` in a
            ``DLRMTrain``, or an earlier one. For terms with ``serving=True``, its output is read as
            the logits, (B, T). If tasks have their own towers (shared bottom, MMoE, PLE): a mapping
            from each task, or a tuple of tasks that share a tower, to its tower,
            ``{"click": "towers.click", "buy": "towers.buy"}``. Instead of a name,
            :class:`OutputsOf` joins the outputs of several submodules into the representation:
            for two towers, ``OutputsOf("query_tower", "item_tower")``.
        terms: what is distilled, see :class:`DistillationTerm`.
        teachers: the names of the M teachers, in the order of the outputs.
        tasks: the T tasks, in the order of the outputs and of the labels.
        in_features: D; None: the input width of the first ``nn.Linear`` in the tapped module (for
            ``OutputsOf``, the output widths of each module's last one, added up).
        serving_logits: a function from the student's output to its logits, (B, T) or (B,), with
            gradient, for terms with ``serving=True``; None: the tapped module's output.

    Raises:
        ValueError: if ``tap`` names no submodule that can be tapped, or its width can't be
            inferred; for terms that do not fit; for a student already sharded or wrapped.
        TypeError: for terms or tasks of another type.
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
            [tapped_module(student, name) for name in tapped_names(target)] for _, target in groups
        ]
        widths: dict[str | tuple[str, ...], int] = {
            names: tapped_width(target, tapped) if in_features is None else in_features
            for (names, target), tapped in zip(groups, modules, strict=True)
        }
        # Drawing the heads' weights must not change the random numbers that the user draws next.
        with torch.random.fork_rng(devices=[]):
            heads = AuxiliaryHead(widths, terms=terms, teachers=teachers, tasks=tasks)
        # A student on the meta device is skipped: there the heads would lose their initial values.
        weight = next(modules[0][0].parameters(), None)
        if weight is not None and not weight.is_meta:
            heads.to(device=weight.device, dtype=weight.dtype)
        remove_taps(student)
        # The export needs the student as it was before sharding. A tuple hides it from nn.Module,
        # so that it is neither a submodule nor part of the state.
        self.bare_student = (_without_weights(student),)
        self.student = student
        keeps_output = serving_logits is None and any(term.serving for term in heads.terms)
        taps = []
        for (names, target), tapped in zip(groups, modules, strict=True):
            halves = any(
                term.loss.width == 0 and {*names} & {*(term.tasks or names)} for term in heads.terms
            )
            options = {"keeps_output": keeps_output, "halves": halves}
            taps.append(Tap(target, tapped, widths[names], names, **options))
        self.exfm = _Supervision(heads, taps, serving_logits)

    def forward(self, batch: Any) -> Any:
        """Run the student and, in training, add the distillation loss: see the class.

        Raises:
            TypeError: in training, for a batch that is no ExFMBatch, or a student whose outputs do
                not follow the contract.
            RuntimeError: in training, if a tapped module does not run exactly once.
            ValueError: in training, if a tapped module's input is not (B, D), or if something that
                the terms need is missing or has another shape.

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
        finally:  # a tap that stayed open would hold the batch's activations
            for tap in self.exfm.taps:
                tap.clear()

    @property
    def auxiliary_head(self) -> AuxiliaryHead:
        """The auxiliary head, whose state dict keys begin with ``exfm.``."""
        return self.exfm.auxiliary_head

    @property
    def last_losses(self) -> Tensor | None:
        """The terms' unweighted losses in the last training forward, (K,), detached."""
        return self.exfm.last_losses

    @property
    def last_teacher(self) -> TeacherOutputs | None:
        """The teacher outputs in the last training forward."""
        return self.exfm.last_teacher

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            # From __dict__: before Module.__init__, and in unpickling, there is no _modules yet.
            student = self.__dict__.get("_modules", {}).get("student")
            if name.startswith("__") or not hasattr(student, name):
                raise
            raise AttributeError(f"{error}: the student's own is .student.{name}") from None


def find_wrapper(model: nn.Module) -> ExFMWrapper:
    """Return the ExFMWrapper in a model, however deeply DMP and DDP wrap it.

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
    """Return the ExFMWrapper in a model, or None if there is none."""
    return next((module for module in model.modules() if isinstance(module, ExFMWrapper)), None)


class _Supervision(nn.Module):
    """The step that adds the heads' loss to the student's.

    It is a separate module so that the pipeline's tracing treats it as a leaf and runs it as is.
    """

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
        # inputs() waits for an all-reduce, and runs the adapter's: after the student's forward.
        serving, step_inputs = self._serving(outputs), inputs()
        added, self.last_losses = self.auxiliary_head(shared, serving=serving, **vars(step_inputs))
        batch.end_step(step_inputs)
        self.last_teacher = step_inputs.teacher
        return loss + added, rest

    def _serving(self, outputs: Any) -> Any:
        """Return the serving head's logits, (B, T), or None if no term needs them."""
        if not any(term.serving for term in self.auxiliary_head.terms):
            return None
        if self.serving_logits is not None:
            return self._call_serving_logits(outputs)
        logits = [tap.take_output() for tap in self.taps]
        names = [name for tap in self.taps for name in tap.tasks]
        order = [names.index(name) for name in self.auxiliary_head.task_names]
        return pick_columns(logits[0] if len(logits) == 1 else torch.cat(logits, dim=1), order)

    def _call_serving_logits(self, outputs: Any) -> Tensor:
        assert self.serving_logits is not None
        what = "what the student returns to its logits"
        logits: Tensor = read("serving_logits", self.serving_logits, outputs, "ExFMWrapper", what)
        if torch.is_grad_enabled() and isinstance(logits, Tensor) and not logits.requires_grad:
            raise ValueError(
                "serving_logits should give logits with their gradient, which terms with "
                "serving=True send to the serving head; received logits without it: return them "
                "from the student's forward without .detach(), or tap the module that computes them"
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
    """Copy a module, its parameters on the meta device; return the error if that fails."""
    weights = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    try:
        bare: nn.Module = copy.deepcopy(module, weights)
    except Exception as error:  # any attribute of the user's may raise; only an export needs this
        return error
    return bare

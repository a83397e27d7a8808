"""The user's training module, wrapped: its own loss, plus what the teachers' heads add.

Shapes: B examples, D width of the shared representation, M teachers, T tasks, K terms.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_exfm._compat import sharded_names
from torchrec_exfm._warnings import DistillationWarning
from torchrec_exfm.batch import ExFMBatch, TeacherOutputs
from torchrec_exfm.heads import AuxiliaryHead, DistillationTerm, Task

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
        student: ``forward(batch) -> (loss, (loss, logits, labels))``, as ``DLRMTrain``.
        tap: the name, below ``student``, of the submodule whose first argument is the shared
            representation, (B, D): usually the one after the interaction, ``"model.over_arch"``
            in a ``DLRMTrain``. For terms with ``serving=True`` its output is the logits, (B, T).
        terms: what is distilled, see :class:`DistillationTerm`.
        teachers: the names of the M teachers, in the order of the outputs.
        tasks: the T tasks, in the order of the outputs and of the labels.
        in_features: D; None: that of the first ``nn.Linear`` in the tapped module.

    Raises:
        ValueError: if ``tap`` is no submodule, or its width can't be told; for wrong terms; for
            a student that is sharded already.
        TypeError: for terms or tasks of another kind.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        tap: str,
        terms: Sequence[DistillationTerm] = (DistillationTerm(),),
        teachers: Sequence[str] = ("teacher",),
        tasks: Sequence[Task] = (Task(),),
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        if sharded_names(student):
            raise ValueError(
                f"the student should not be sharded yet; received {type(student).__name__} with "
                f"the sharded {sharded_names(student)}: wrap it before DistributedModelParallel"
            )
        tapped = _tapped_module(student, tap)
        width = _width(tapped, tap) if in_features is None else in_features
        with torch.random.fork_rng(devices=[]):  # the student's initialisation stays as it was
            heads = AuxiliaryHead(width, terms=terms, teachers=teachers, tasks=tasks)
        weight = next(tapped.parameters(), None)
        if weight is not None and not weight.is_meta:
            heads.to(device=weight.device, dtype=weight.dtype)
        _remove_taps(student)
        self.bare_student = (_without_weights(student),)  # a tuple: no submodule, no state
        self.student = student
        self.exfm = _Supervision(heads, _Tap(tap, tapped, width, _candidates(student)))
        tapped.register_forward_pre_hook(self.exfm.tap, with_kwargs=True)
        if any(term.serving for term in terms):
            tapped.register_forward_hook(self.exfm.tap.keep_output)

    def forward(self, batch: Any) -> Any:
        """See the class.

        Raises:
            TypeError: in training, for a batch that is no ExFMBatch, or a student whose outputs are
                not of the contract.
            RuntimeError: in training, if the tapped module does not run exactly once.
            ValueError: in training, if the tapped module's input is not (B, D), or what the terms
                need is missing or of another shape.

        Warns:
            DistillationWarning: if the tapped module's input or output carries no gradient.
        """
        self.exfm.tap.open()
        outputs = self.student(batch.batch if isinstance(batch, ExFMBatch) else batch)
        if self.training:
            return self.exfm(outputs, batch)
        self.exfm.tap.clear()
        return outputs

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


class _Tap:
    """A forward pre-hook that keeps the first argument of the tapped module.

    For terms of the serving head also a hook that keeps its output.
    """

    def __init__(self, name: str, tapped: nn.Module, width: int, candidates: list[str]) -> None:
        self.name = name
        self.argument = next(iter(inspect.signature(tapped.forward).parameters), "")
        self.width = width
        self.candidates = candidates
        self._value: Any = None
        self._output: Any = None
        self._calls = 0
        self._open = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._open:  # the student runs by itself, or once more in backward
            return
        only = next(iter(kwargs.values())) if len(kwargs) == 1 else None
        self._value = args[0] if args else kwargs.get(self.argument, only)
        self._calls += 1

    def keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: keeps what the tapped module returns, as it is now."""
        if self._open:
            self._output = output.clone() if isinstance(output, Tensor) else output

    def open(self) -> None:
        """Keep what comes, from now until the tap is cleared."""
        self.clear()
        self._open = True

    def clear(self) -> None:
        """Forget, and close."""
        self._value, self._output, self._calls, self._open = None, None, 0, False

    def take(self) -> tuple[Tensor, Any]:
        """The representation of this forward, and the output if it was kept; clears the tap."""
        value, output, calls = self._value, self._output, self._calls
        self.clear()
        if calls != 1:
            raise RuntimeError(
                f"the tapped module {self.name!r} should run exactly once in the student's "
                f"forward; it ran {calls} times: tap another module, such as {self.candidates}"
            )
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != self.width:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the first argument of the tapped module {self.name!r} should be a tensor of "
                f"shape (B, {self.width}); received {shape}: pass in_features, or tap another "
                f"module, such as {self.candidates}"
            )
        for what, tensor in (("input", value), ("output", output)):
            if torch.is_grad_enabled() and isinstance(tensor, Tensor) and not tensor.requires_grad:
                warnings.warn(
                    f"the {what} of the tapped module {self.name!r} carries no gradient, so "
                    "nothing of the teacher reaches the network below it; with activation "
                    "checkpointing around the tap use use_reentrant=False",
                    DistillationWarning,
                    stacklevel=2,
                )
        return value, output


class _Supervision(nn.Module):
    """Adds the heads' loss to the student's: a leaf of the pipeline's tracing, run as it is."""

    def __init__(self, auxiliary_head: AuxiliaryHead, tap: _Tap) -> None:
        super().__init__()
        self.auxiliary_head = auxiliary_head
        self.tap = tap
        self.last_losses: Tensor | None = None
        self.last_teacher: TeacherOutputs | None = None

    def forward(self, outputs: Any, batch: Any) -> tuple[Tensor, Any]:
        if not isinstance(batch, ExFMBatch):
            raise TypeError(
                f"training should be given an ExFMBatch; received {type(batch).__name__}: let "
                "TrainPipelineExFM make it, or build ExFMBatch(batch, TeacherOutputs(...))"
            )
        loss, rest = _checked_contract(outputs)
        shared, serving = self.tap.take()
        added, self.last_losses = self.auxiliary_head(
            shared, batch.teacher, batch.adapted, batch.count, serving, batch.fresh_labels
        )
        self.last_teacher = batch.teacher
        return loss + added, rest


def _checked_contract(outputs: Any) -> tuple[Tensor, Any]:
    if isinstance(outputs, tuple) and len(outputs) == 2:
        loss = outputs[0]
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss, outputs[1]
    raise TypeError(
        "the student's forward should return (loss, (loss, logits, labels)) with a loss of one "
        f"element, as torchrec.models.dlrm.DLRMTrain; received {_outline(outputs)}"
    )


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_outline(item) for item in value)})"
    return type(value).__name__


def _tapped_module(student: nn.Module, tap: str) -> nn.Module:
    modules = dict(student.named_modules())
    if tap not in modules or not tap:
        raise ValueError(
            f"tap should name a submodule of {type(student).__name__}; received {tap!r}; "
            f"candidates: {_candidates(student)}"
        )
    tapped: nn.Module = modules[tap]
    return tapped


def _width(tapped: nn.Module, tap: str) -> int:
    for module in tapped.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(
        f"the width of the shared representation can't be told from the tapped module {tap!r} "
        f"({type(tapped).__name__}), which has no nn.Linear: pass in_features"
    )


def _candidates(student: nn.Module) -> list[str]:
    """Submodules that hold linear layers and no embedding tables."""
    return [
        name
        for name, module in student.named_modules()
        if name
        and any(isinstance(child, nn.Linear) for child in module.modules())
        and not any(
            isinstance(child, (nn.Embedding, nn.EmbeddingBag)) for child in module.modules()
        )
    ]


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


def _remove_taps(student: nn.Module) -> None:
    """Drop the hooks of an earlier wrapper around the same student."""
    for module in student.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Tap):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Tap):
                del module._forward_hooks[key]

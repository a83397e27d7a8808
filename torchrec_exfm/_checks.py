"""Checks of a train pipeline's arguments, before the first step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from torchrec_exfm._compat import frees_features, unsharded_tables
from torchrec_exfm._warnings import DistillationWarning, NotPipelinedWarning
from torchrec_exfm.adapter import StudentAdapter
from torchrec_exfm.auxiliary import AuxiliaryHead
from torchrec_exfm.sources import LiveTeacher, TeacherSource


def check_teacher(teacher: object, head: AuxiliaryHead, model: nn.Module) -> None:
    """Raise unless it is a teacher, not the student itself, with the head's teachers and tasks."""
    valid = teacher is None or callable(teacher) or isinstance(teacher, TeacherSource)
    # A bare module is callable too, but would run on the host, with gradient and in training mode.
    if isinstance(teacher, (nn.Module, type)) or not valid:
        raise TypeError(
            "teacher should be None, a function of the batch, a TeacherLookup, LiveTeacher(module) "
            f"or another source with start(batch); received {type(teacher).__name__}"
        )
    if isinstance(teacher, LiveTeacher) and any(m is teacher.model for m in model.modules()):
        raise ValueError("the live teacher should be another model; received the student's own")
    # A look-up names its teachers and tasks. A single one can't be confused, so its name is free.
    for what, names in (("teachers", head.teachers), ("tasks", head.task_names)):
        received = tuple(getattr(teacher, what, names))
        if len(received) != len(names) or (len(names) > 1 and received != names):
            raise ValueError(
                f"the look-up should have the wrapper's {what}, {names}, in this order; received "
                f"{received}"
            )


def check_features(teacher: object, pipeline: Any) -> None:
    """Raise if TorchRec's pipeline frees the features before a live teacher reads them."""
    if isinstance(teacher, LiveTeacher) and frees_features(pipeline):
        raise ValueError(
            "free_features_storage_early should be False with a LiveTeacher, which reads the "
            "features after TorchRec would have freed them; received True"
        )


def check_on_error(on_teacher_error: str, teacher: object) -> None:
    """Raise for an unknown option, or for "mask" without a teacher whose failures can be masked."""
    if on_teacher_error not in ("raise", "mask"):
        raise ValueError(
            f"on_teacher_error should be 'raise' or 'mask'; received {on_teacher_error!r}"
        )
    if on_teacher_error == "mask" and (teacher is None or isinstance(teacher, LiveTeacher)):
        raise ValueError(
            "on_teacher_error should be 'raise' without a teacher, and with a LiveTeacher, whose "
            "ranks have to fail together; received 'mask'"
        )


def warn_if_tables_unsharded(model: nn.Module) -> None:
    """Warn of tables under DistributedModelParallel that the sharding plan did not name."""
    unsharded = unsharded_tables(model)
    if unsharded:
        warnings.warn(
            f"the embeddings {unsharded} are not sharded, although the model is under "
            "DistributedModelParallel: make the sharding plan from the wrapped model, whose names "
            "begin with 'student.'",
            NotPipelinedWarning,
            stacklevel=3,
        )


def warn_if_heads_untrained(optimizer: torch.optim.Optimizer, head: AuxiliaryHead) -> None:
    """Warn if the optimizer misses the heads, which send gradients down even if untrained."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # Parameters with an optimizer in backward (apply_optimizer_in_backward) need no other.
    parameters = [p for p in head.parameters() if not hasattr(p, "_in_backward_optimizers")]
    if parameters and not any(id(parameter) in trained for parameter in parameters):
        warnings.warn(
            "the optimizer should hold the parameters of the distillation heads; received one "
            "without: make it of the wrapped model's parameters",
            DistillationWarning,
            stacklevel=3,
        )


def check_adapter(
    head: AuxiliaryHead,
    adapter: StudentAdapter | None,
    adapter_optimizer: torch.optim.Optimizer | None,
) -> None:
    """Raise unless the terms and the adapter need each other, and the adapter has their shape."""
    if adapter is None and adapter_optimizer is not None:
        raise ValueError("adapter_optimizer should come with its adapter: pass adapter")
    adapted = [term.name for term in head.terms if term.adapted]
    if adapted and adapter is None:
        raise ValueError(
            f"the terms {adapted} learn from a student adapter, and received none: pass "
            "adapter=StudentAdapter() to the pipeline"
        )
    if adapter is not None and not adapted:
        raise ValueError(
            "no term learns from the adapter: give the wrapper a DistillationTerm(adapted=True), "
            "or pass no adapter"
        )
    expected = (len(head.teachers), len(head.tasks))
    if adapter is not None and adapter.shape != expected:
        raise ValueError(
            f"the adapter should be for (teachers, tasks) = {expected}; received {adapter.shape}"
        )


def check_keys(head: AuxiliaryHead, groups: object, candidates: object) -> None:
    """Raise if a term's loss needs groups or candidates and there is no function for them."""
    for what, keys in (("groups", groups), ("candidates", candidates)):
        names = [term.name for term in head.terms if getattr(term.loss, f"needs_{what}")]
        if names and keys is None:
            raise ValueError(
                f"the losses of the terms {names} need {what}, and received none: pass {what}=..., "
                "a function of the user's batch to its ids, to the pipeline"
            )

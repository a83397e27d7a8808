"""Getting the student back: for serving, and as a checkpoint of the bare student."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrec_exfm._compat import ShardedTensor, shape_and_dtype
from torchrec_exfm._gather import gather_to_rank_0
from torchrec_exfm._ranks import rank
from torchrec_exfm.wrapper import find_wrapper

__all__ = ["export_student", "student_state_dict"]


def student_state_dict(model: nn.Module) -> dict[str, Any]:
    """The student's part of the state, under the bare student's own keys.

    Under DMP the tables are sharded tensors that share their storage with the model: saving this
    with ``torch.distributed.checkpoint`` gives a checkpoint of the bare student, and loading such
    a checkpoint into it loads the model, in place.

    Args:
        model: an ExFMWrapper, or a model that holds one.

    Raises:
        ValueError: if there is no ExFMWrapper.
    """
    state: dict[str, Any] = find_wrapper(model).student.state_dict()
    return state


def export_student(model: nn.Module) -> nn.Module | None:
    """The user's own module for serving: their class, their keys, not a parameter more.

    A copy, unsharded, on the CPU, in evaluation mode; structure, plain attributes and dtypes are
    those it had when it was wrapped. The model can train on. Under several ranks every rank must
    call it: the tables are gathered in the host memory of rank 0, which needs room for one whole
    student; a GPU needs room for 64 MiB. Where a model of your own reads pooled embeddings, let it
    read them by key: the order within ``KeyedTensor.values()`` depends on the sharding plan.
    ``examples/serve.py`` writes it to files in five ways, and serves from them. A student that has
    a memory's features is served with the memory: ``das.memory_server.write_needs`` says of which.

    Args:
        model: an ExFMWrapper, or a model that holds one.

    Returns:
        The bare student on rank 0, None on the others.

    Raises:
        ValueError: if there is no ExFMWrapper.
        TypeError: if the student could not be copied when it was wrapped.
    """
    wrapper = find_wrapper(model)
    bare = copy.deepcopy(wrapper.bare_student[0])
    if isinstance(bare, Exception):
        raise TypeError(
            "the student should be one that copy.deepcopy can copy before its first step; when "
            f"it was wrapped that raised {type(bare).__name__}: {bare}; load "
            "student_state_dict(model) into a student of your own instead"
        ) from bare
    if rank() == 0:
        for parameter in bare.parameters():  # give them memory; what is shared stays shared
            empty = torch.empty_like(parameter, device="cpu")
            torch.utils.swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))
    # what the student holds beside its state now, which may not be what it held when wrapped
    buffers = dict(wrapper.student.named_buffers(remove_duplicate=False))
    for prefix, module in bare.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and name in buffers:
                module._buffers[key] = _whole(buffers[name])
    state = student_state_dict(model)
    targets = bare.state_dict() if rank() == 0 else {}
    for key, value in state.items():  # into the student's own memory: one copy of a table, not two
        state[key] = _whole(value, targets.get(key))
    if rank() != 0:
        return None
    bare.load_state_dict(state)
    return bare.eval()


def _whole(value: Any, target: Any = None) -> Any:
    """Copy a tensor to the CPU of rank 0, into ``target`` if it has its shape, and return that."""
    if not isinstance(value, Tensor):
        return value
    shape, dtype = shape_and_dtype(value)
    fits = isinstance(target, Tensor) and target.shape == shape
    if isinstance(value, (ShardedTensor, DTensor)):
        if rank() == 0 and not fits:
            target = torch.empty(shape, dtype=dtype)
        gather_to_rank_0(value, target)
        return target
    if rank() != 0:
        return None
    return target.copy_(value.detach()) if fits else value.detach().to("cpu", copy=True)

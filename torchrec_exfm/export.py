"""The bare student out of a wrapped one: for serving, and as a checkpoint."""

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
    """Return the student's part of the state, under the bare student's own keys.

    Under DMP the tables are sharded tensors that share their storage with the model. Saved with
    ``torch.distributed.checkpoint``, the state is a checkpoint of the bare student. Loading such a
    checkpoint into it loads the model, in place.

    Args:
        model: an ExFMWrapper, or a model that holds one.

    Raises:
        ValueError: if there is no ExFMWrapper.
    """
    state: dict[str, Any] = find_wrapper(model).student.state_dict()
    return state


def export_student(model: nn.Module) -> nn.Module | None:
    """Return a copy of your own module for serving: your class, your keys, no further parameter.

    The copy is unsharded, on the CPU and in evaluation mode. Its structure, plain attributes and
    dtypes are those from when it was wrapped. The model itself can go on training.

    With several ranks, every rank must call it. The tables are gathered in the host memory of rank
    0, which needs room for one whole student; a GPU needs room for 64 MiB. A model of your own
    should read pooled embeddings by key: the order within ``KeyedTensor.values()`` depends on the
    sharding plan.

    ``examples/serve.py`` writes the copy to files in five ways, and serves from them. A student
    with a memory's features is served together with the memory:
    ``das.memory_server.write_needs`` records which.

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
        # The copy's parameters are on the meta device. Swapping in place keeps tied ones tied.
        for parameter in bare.parameters():
            empty = torch.empty_like(parameter, device="cpu")
            torch.utils.swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))
    # Buffers outside of the state too, and as they are now: the copy's are from the wrapping.
    buffers = dict(wrapper.student.named_buffers(remove_duplicate=False))
    for prefix, module in bare.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and name in buffers:
                module._buffers[key] = _copy_to_rank_0(buffers[name])
    state = student_state_dict(model)
    targets = bare.state_dict() if rank() == 0 else {}
    for key, value in state.items():  # in place, so that rank 0 never holds a table twice
        state[key] = _copy_to_rank_0(value, targets.get(key))
    if rank() != 0:
        return None
    bare.load_state_dict(state)
    return bare.eval()


def _copy_to_rank_0(value: Any, target: Any = None) -> Any:
    """Return a copy of a tensor on the CPU of rank 0: ``target``, filled, if it has the shape."""
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

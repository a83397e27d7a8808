"""Reading a representation out of an unedited student: hooks on one of its submodules.

Shapes: B examples, D width of the shared representation.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_exfm._warnings import DistillationWarning


class Tap:
    """Keeps the first argument of a submodule, (B, D), for one forward.

    And its output, the logits of ``tasks``, if ``keeps_output``.
    """

    def __init__(
        self, name: str, tapped: nn.Module, width: int, tasks: Sequence[str], keeps_output: bool
    ) -> None:
        self.name = name
        self.width = width
        self.tasks = tuple(tasks)
        self._argument = next(iter(inspect.signature(tapped.forward).parameters), "")
        self._input: Any = None
        self._output: Any = None
        self._calls = 0
        self._open = False
        tapped.register_forward_pre_hook(self.keep_input, with_kwargs=True)
        if keeps_output:
            tapped.register_forward_hook(self.keep_output)

    def keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        if not self._open:  # the student runs by itself, or once more in backward
            return
        only = next(iter(kwargs.values())) if len(kwargs) == 1 else None
        self._input = args[0] if args else kwargs.get(self._argument, only)
        self._calls += 1

    def keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: the output as it is now, as the student may change it in place."""
        if self._open:
            self._output = output.clone() if isinstance(output, Tensor) else output

    def open(self) -> None:
        """Keep what comes, from now until the tap is cleared."""
        self.clear()
        self._open = True

    def clear(self) -> None:
        """Forget, and close."""
        self._input, self._output, self._calls, self._open = None, None, 0, False

    def take_input(self, *, learns: bool = True) -> Tensor:
        """The representation of this forward, (B, D), from which the network below learns.

        Raises:
            RuntimeError: if the submodule did not run exactly once.
            ValueError: if its first argument is of another shape.
        """
        if self._calls != 1:
            raise RuntimeError(
                f"the tapped module {self.name!r} should run exactly once in the student's "
                f"forward; it ran {self._calls} times: tap a module that runs once, or one for "
                "each task (tap={task: module, ...})"
            )
        value = self._input
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != self.width:
            raise ValueError(
                f"the first argument of the tapped module {self.name!r} should be a tensor of "
                f"shape (B, {self.width}); received {_shape(value)}: pass in_features, or tap a "
                "module that takes such a tensor"
            )
        if learns:
            self._warn_without_gradient("input", value)
        return value

    def take_output(self) -> Tensor:
        """What the submodule returned: the logits of the tap's tasks, (B, tasks).

        Raises:
            ValueError: for an output of another shape.
        """
        output, width = self._output, len(self.tasks)
        self._warn_without_gradient("output", output)
        fits = isinstance(output, Tensor) and output.dim() in (1, 2)
        if not fits or output.numel() != len(output) * width:
            raise ValueError(
                f"the output of the tapped module {self.name!r} should be the logits of the tasks "
                f"{list(self.tasks)}, (B, {width}); received {_shape(output)}: tap the module that "
                "gives them, or pass serving_logits"
            )
        logits: Tensor = output.reshape(len(output), width)
        return logits

    def _warn_without_gradient(self, what: str, value: Any) -> None:
        if torch.is_grad_enabled() and isinstance(value, Tensor) and not value.requires_grad:
            warnings.warn(
                f"the {what} of the tapped module {self.name!r} carries no gradient, so "
                "nothing of the teacher reaches the network below it; with activation "
                "checkpointing around the tap use use_reentrant=False",
                DistillationWarning,
                stacklevel=3,
            )


def remove_taps(student: nn.Module) -> None:
    """Drop the hooks of an earlier wrapper around the same student."""
    for module in student.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Tap):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def tapped_module(student: nn.Module, tap: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: if there is none, or it is a mere container, whose forward never runs.
    """
    modules = dict(student.named_modules())
    if tap not in modules or not tap:
        raise ValueError(
            f"tap should name a submodule of {type(student).__name__}; received {tap!r}; "
            f"candidates: {_candidates(student)}"
        )
    tapped: nn.Module = modules[tap]
    if not _has_forward(tapped):
        inside = [name for name in _candidates(student) if name.startswith(f"{tap}.")]
        raise ValueError(
            f"tap should name a submodule that has a forward of its own; received {tap!r}, a "
            f"{type(tapped).__name__}: tap what is in it, for each task "
            f"(tap={{task: module, ...}}); candidates: {inside}"
        )
    return tapped


def tapped_width(tapped: nn.Module, tap: str) -> int:
    """D, of the first linear layer.

    Raises:
        ValueError: if there is none.
    """
    for module in tapped.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(
        f"the width of the shared representation can't be told from the tapped module {tap!r} "
        f"({type(tapped).__name__}), which has no nn.Linear: pass in_features"
    )


def _candidates(student: nn.Module) -> list[str]:
    """Submodules with a forward that hold linear layers and no embedding tables."""
    tables = nn.Embedding, nn.EmbeddingBag
    return [
        name
        for name, module in student.named_modules()
        if name
        and _has_forward(module)
        and any(isinstance(child, nn.Linear) for child in module.modules())
        and not any(isinstance(child, tables) for child in module.modules())
    ]


def _has_forward(module: nn.Module) -> bool:
    """Whether it can be called, as an nn.ModuleDict or nn.ModuleList can not."""
    return type(module).forward is not nn.Module.forward


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

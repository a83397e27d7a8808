"""Hooks that read the shared representation out of an unedited student.

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
from torchrec_exfm.tasks import check_names


class OutputsOf:
    """The names of submodules whose concatenated outputs are the shared representation.

    ``ExFMWrapper(student, tap=OutputsOf("query_tower", "item_tower"))`` taps two towers, [u, v].
    Losses over in-batch candidates split it into two halves, the query's first. Each module returns
    (B, D_i), or a tuple of such tensors.

    Args:
        *modules: names below the student.

    Raises:
        ValueError: without names, or if one is repeated.
    """

    def __init__(self, *modules: str) -> None:
        self.modules = check_names("modules of OutputsOf", modules)

    def __repr__(self) -> str:
        return f"OutputsOf{self.modules}"


class Tap:
    """The shared representation, (B, D), of one forward.

    It is the first argument of the module that ``tap`` names, or the concatenated outputs of
    :class:`OutputsOf`. With ``halves``, these are two of one width, a query's and an item's. With
    ``keeps_output``, the tap also keeps the module's output, the logits of ``tasks``.
    """

    def __init__(
        self,
        tap: str | OutputsOf,
        modules: Sequence[nn.Module],
        width: int,
        tasks: Sequence[str],
        *,
        keeps_output: bool,
        halves: bool,
    ) -> None:
        if halves and isinstance(tap, str):
            raise ValueError(
                "a loss over in-batch candidates should be given tap=OutputsOf(query tower, item "
                f"tower); received tap={tap!r}"
            )
        self.name = ", ".join(tapped_names(tap))
        self.width = width
        self.tasks = tuple(tasks)
        self._reads_outputs = isinstance(tap, OutputsOf)
        self._halves = halves
        self._modules = tuple(modules)
        self._inputs: list[Any] = []  # one per call, so that a module that runs twice is noticed
        self._outputs: dict[nn.Module, Any] = {}
        self._open = False
        self._first_names = {
            module: next(iter(inspect.signature(module.forward).parameters), "")
            for module in modules
        }
        for module in modules:
            module.register_forward_pre_hook(self.keep_input, with_kwargs=True)
            if keeps_output or self._reads_outputs:
                module.register_forward_hook(self.keep_output)

    def keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a module's first argument: a forward pre-hook."""
        # Closed while the student runs alone, or again in backward under activation checkpointing.
        if not self._open:
            return
        only = next(iter(kwargs.values())) if len(kwargs) == 1 else None
        self._inputs.append(args[0] if args else kwargs.get(self._first_names[module], only))

    def keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep a copy of a module's output: a forward hook. The student may change it in place."""
        if self._open:
            self._outputs[module] = _cloned(output)

    def open(self) -> None:
        """Start to keep inputs and outputs, until the tap is cleared."""
        self.clear()
        self._open = True

    def clear(self) -> None:
        """Close the tap and drop what it kept."""
        self._inputs, self._outputs, self._open = [], {}, False

    def take_input(self, *, learns: bool = True) -> Tensor:
        """Return this forward's representation, (B, D); if ``learns``, warn if it has no gradient.

        Raises:
            RuntimeError: if a module did not run exactly once.
            ValueError: if its input or output has another shape.
        """
        calls = len(self._outputs if self._reads_outputs else self._inputs)
        if not calls == len(self._inputs) == len(self._modules):
            raise RuntimeError(
                f"the tapped module {self.name!r} should run exactly once in the student's "
                f"forward; it ran {len(self._inputs)} times: tap a module that runs once, or one "
                "for each task (tap={task: module, ...})"
            )
        parts, what = self._inputs, "first argument"
        if self._reads_outputs:
            outputs, what = [self._outputs[module] for module in self._modules], "output"
            parts = [
                v for output in outputs for v in (output if type(output) is tuple else [output])
            ]
        widths = [v.shape[1] if isinstance(v, Tensor) and v.dim() == 2 else -1 for v in parts]
        if -1 in widths or sum(widths) != self.width:
            raise ValueError(
                f"the {what} of the tapped module {self.name!r} should be a tensor of "
                f"shape (B, {self.width}); received {', '.join(map(_shape, parts))}: pass "
                "in_features, or tap a module that takes such a tensor"
            )
        if self._halves and widths != [self.width / 2] * 2:
            raise ValueError(
                f"the outputs of {self.name!r} should be a query's vectors and an item's, of one "
                f"width, for a loss over in-batch candidates; received the widths {widths}"
            )
        shared: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if learns:
            self._warn_without_gradient(what, shared)
        return shared

    def take_output(self) -> Tensor:
        """Return the submodule's output: the logits of the tap's tasks, (B, tasks).

        Raises:
            ValueError: if it has another shape.
        """
        output = None if self._reads_outputs else self._outputs.get(self._modules[0])
        width = len(self.tasks)
        self._warn_without_gradient("output", output)
        fits = isinstance(output, Tensor) and output.dim() in (1, 2)
        if output is None or not fits or output.numel() != len(output) * width:
            raise ValueError(
                f"the output of the tapped module {self.name!r} should be the logits of the tasks "
                f"{list(self.tasks)}, (B, {width}); received {_shape(output)}: tap the module that "
                "returns them, or pass serving_logits"
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


def _cloned(output: Any) -> Any:
    """Clone each tensor of an output."""
    if isinstance(output, (tuple, list)):
        return tuple(map(_cloned, output))
    return output.clone() if isinstance(output, Tensor) else output


def remove_taps(student: nn.Module) -> None:
    """Drop the hooks of an earlier wrapper around the same student."""
    for module in student.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Tap):
                    del hooks[key]
                    # Module keeps the keys of hooks with keyword arguments in a second dict.
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def tapped_names(tap: str | OutputsOf) -> tuple[str, ...]:
    """Return the names of the modules that are tapped."""
    return tap.modules if isinstance(tap, OutputsOf) else (tap,)


def tapped_module(student: nn.Module, tap: str) -> nn.Module:
    """Return the submodule of that name.

    Raises:
        ValueError: if there is none, or if it is a bare container, which has no forward.
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
            f"{type(tapped).__name__}: tap a submodule in it, one for each task "
            f"(tap={{task: module, ...}}); candidates: {inside}"
        )
    return tapped


def tapped_width(tap: str | OutputsOf, modules: Sequence[nn.Module]) -> int:
    """Return D: the first linear layer's input width, or the last ones' output widths, added up.

    Raises:
        ValueError: if a module has no linear layer.
    """
    total = 0
    for name, module in zip(tapped_names(tap), modules, strict=True):
        linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
        if not linear:
            raise ValueError(
                "the width of the shared representation can't be inferred from the tapped module "
                f"{name!r} ({type(module).__name__}), which has no nn.Linear: pass in_features"
            )
        total += linear[0].in_features if isinstance(tap, str) else linear[-1].out_features
    return total


def _candidates(student: nn.Module) -> list[str]:
    """Return the submodules with a forward that hold linear layers and no embedding tables."""
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
    """Return whether a module can be called, which nn.ModuleDict and nn.ModuleList can't be."""
    return type(module).forward is not nn.Module.forward


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

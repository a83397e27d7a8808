"""Reading a representation out of an unedited student: hooks on its submodules.

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
    """Names submodules whose outputs, side by side, are the shared representation.

    ``ExFMWrapper(student, tap=OutputsOf("query_tower", "item_tower"))``: two towers, [u, v], which
    losses over in-batch candidates take in two halves, the query's first. An output is (B, D_i), or
    a tuple of such tensors.

    Args:
        *modules: names below the student.

    Raises:
        ValueError: for no names, or one that comes twice.
    """

    def __init__(self, *modules: str) -> None:
        self.modules = check_names("modules of OutputsOf", modules)

    def __repr__(self) -> str:
        return f"OutputsOf{self.modules}"


class Tap:
    """Keeps the shared representation, (B, D), for one forward.

    It is the first argument of the module that ``where`` names, or what the modules of
    :class:`OutputsOf` return, side by side; with ``halves`` two of one width, a query's and an
    item's. Beside it the output of the module, the logits of ``tasks``, if ``keeps_output``.
    """

    def __init__(
        self,
        where: str | OutputsOf,
        modules: Sequence[nn.Module],
        width: int,
        tasks: Sequence[str],
        *,
        keeps_output: bool,
        halves: bool,
    ) -> None:
        if halves and isinstance(where, str):
            raise ValueError(
                "a loss over in-batch candidates should be given tap=OutputsOf(query tower, item "
                f"tower); received tap={where!r}"
            )
        self.name = ", ".join(tapped_names(where))
        self.width = width
        self.tasks = tuple(tasks)
        self._of_outputs = isinstance(where, OutputsOf)
        self._halves = halves
        self._modules = tuple(modules)
        self._inputs: list[Any] = []  # one for each call
        self._outputs: dict[nn.Module, Any] = {}
        self._open = False
        self._first_names = {
            module: next(iter(inspect.signature(module.forward).parameters), "")
            for module in modules
        }
        for module in modules:
            module.register_forward_pre_hook(self.keep_input, with_kwargs=True)
            if keeps_output or self._of_outputs:
                module.register_forward_hook(self.keep_output)

    def keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        if not self._open:  # the student runs by itself, or once more in backward
            return
        only = next(iter(kwargs.values())) if len(kwargs) == 1 else None
        self._inputs.append(args[0] if args else kwargs.get(self._first_names[module], only))

    def keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: the output as it is now, as the student may change it in place."""
        if self._open:
            self._outputs[module] = _copied(output)

    def open(self) -> None:
        """Keep what comes, from now until the tap is cleared."""
        self.clear()
        self._open = True

    def clear(self) -> None:
        """Forget, and close."""
        self._inputs, self._outputs, self._open = [], {}, False

    def take_input(self, *, learns: bool = True) -> Tensor:
        """The representation of this forward, (B, D), from which the network below learns.

        Raises:
            RuntimeError: if a module did not run exactly once.
            ValueError: if what it is given, or what it returns, is of another shape.
        """
        ran = len(self._outputs if self._of_outputs else self._inputs)
        if not ran == len(self._inputs) == len(self._modules):
            raise RuntimeError(
                f"the tapped module {self.name!r} should run exactly once in the student's "
                f"forward; it ran {len(self._inputs)} times: tap a module that runs once, or one "
                "for each task (tap={task: module, ...})"
            )
        parts, what = self._inputs, "first argument"
        if self._of_outputs:
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
        """What the submodule returned: the logits of the tap's tasks, (B, tasks).

        Raises:
            ValueError: for an output of another shape.
        """
        output = None if self._of_outputs else self._outputs.get(self._modules[0])
        width = len(self.tasks)
        self._warn_without_gradient("output", output)
        fits = isinstance(output, Tensor) and output.dim() in (1, 2)
        if output is None or not fits or output.numel() != len(output) * width:
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


def _copied(output: Any) -> Any:
    """Tensors as they are now."""
    if isinstance(output, (tuple, list)):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def remove_taps(student: nn.Module) -> None:
    """Drop the hooks of an earlier wrapper around the same student."""
    for module in student.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Tap):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def tapped_names(where: str | OutputsOf) -> tuple[str, ...]:
    """The names of the modules that it names."""
    return where.modules if isinstance(where, OutputsOf) else (where,)


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


def tapped_width(where: str | OutputsOf, modules: Sequence[nn.Module]) -> int:
    """D: what the first linear layer takes, or what the last ones of several modules give.

    Raises:
        ValueError: if one has none.
    """
    total = 0
    for name, module in zip(tapped_names(where), modules, strict=True):
        linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
        if not linear:
            raise ValueError(
                "the width of the shared representation can't be told from the tapped module "
                f"{name!r} ({type(module).__name__}), which has no nn.Linear: pass in_features"
            )
        total += linear[0].in_features if isinstance(where, str) else linear[-1].out_features
    return total


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

"""The state of every optimizer of a training, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_exfm._compat import fused_optimizers, fused_steps, kind_of, single_optimizers

__all__ = ["NamedOptimizer", "named_optimizers"]


class NamedOptimizer(NamedTuple):
    """An optimizer that is no combination of others, and its parameters by name."""

    optimizer: torch.optim.Optimizer
    parameters: dict[str, Any]
    fused: bool  # its state is made with the tables; that of others at their first step

    def states(self) -> dict[str, Any]:
        """The state by ``parameter/key``, by reference: tensors, and plain values."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def empty_states(
        self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]
    ) -> dict[str, Tensor]:
        """Tensors to read into, for the sizes and dtypes that were saved of this state."""
        tensors = {}
        for key, (size, dtype) in saved.items():
            name, _, last = key.rpartition("/")
            if name in self.parameters:
                tensors[key] = torch.zeros(size, dtype=dtype, device=self._device(name, last))
        return tensors

    def _device(self, name: str, key: str) -> torch.device:
        """As torch.optim has it: steps are counted on the host unless told otherwise."""
        groups = self.optimizer.param_groups
        told = any(group.get("capturable") or group.get("fused") for group in groups)
        device: torch.device = self.parameters[name].device
        return torch.device("cpu") if key == "step" and not told else device

    def numbers(self) -> dict[str, dict[str, Any]]:
        """Of each parameter the kind of its optimizer, its steps, the numbers of its group."""
        return {
            name: {
                "kind": kind_of(self.optimizer),
                "steps": [int(counter) for counter in fused_steps(self.optimizer)],
                "group": _hyperparameters(group),
            }
            for group in self.optimizer.param_groups
            for name in self._names_in(group)
        }

    def _names_in(self, group: Mapping[str, Any]) -> list[str]:
        ids = {id(parameter) for parameter in group["params"]}
        return [name for name, parameter in self.parameters.items() if id(parameter) in ids]

    def take(self, states: Mapping[str, Any], numbers: Mapping[str, dict[str, Any]]) -> None:
        """Go on from what was saved; what is fused has read its state in place."""
        for group in self.optimizer.param_groups:
            for name in self._names_in(group)[:1]:
                _set_hyperparameters(group, numbers[name]["group"])
                for counter in fused_steps(self.optimizer):
                    counter.fill_(numbers[name]["steps"][0])
        if self.fused:
            self.optimizer.zero_grad()  # tells the tables their rate, and no more
            return
        for parameter in self.parameters.values():
            self.optimizer.state.pop(parameter, None)
        for key, value in states.items():
            name, _, last = key.rpartition("/")
            if name in self.parameters:
                self.optimizer.state.setdefault(self.parameters[name], {})[last] = value


def named_optimizers(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    adapter_optimizer: torch.optim.Optimizer | None,
) -> list[NamedOptimizer]:
    """Every optimizer of a training: those fused into a model's tables, its own, the adapter's."""
    fused = [
        (f"fused/{name}", each)
        for combined in fused_optimizers(model)
        for name, each in single_optimizers(combined)
    ]
    known = {id(each) for _, each in fused}
    dense = [(f"dense/{name}", each) for name, each in single_optimizers(optimizer)]
    others = [(name, each) for name, each in dense if id(each) not in known]
    if adapter_optimizer is not None:
        others.append(("adapter_optimizer/", adapter_optimizer))
    return [
        NamedOptimizer(each, _parameters(each, prefix), is_fused)
        for pairs, is_fused in ((fused, True), (others, False))
        for prefix, each in pairs
    ]


def _parameters(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Any]:
    """By TorchRec's names where there are any, else by their position."""
    if isinstance(optimizer, KeyedOptimizer):
        return {prefix + name: parameter for name, parameter in optimizer.params.items()}
    every = [each for group in optimizer.param_groups for each in group["params"]]
    return {f"{prefix}{index}": parameter for index, parameter in enumerate(every)}


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The rates and other numbers of a parameter group."""
    found = {key: _number(value) for key, value in group.items() if key != "params"}
    return {key: value for key, value in found.items() if value is not None}


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        numbers = [_number(each) for each in value]
        return None if None in numbers else numbers
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _set_hyperparameters(group: Any, numbers: Mapping[str, Any]) -> None:
    for key, value in numbers.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value

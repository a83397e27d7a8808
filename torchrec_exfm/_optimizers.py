"""The state of every optimizer of a training, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import TensorStorageMetadata
from torchrec.distributed.train_pipeline import TrainPipeline
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_exfm._compat import (
    fused_optimizers,
    fused_steps,
    optimizer_class_name,
    pipeline_parts,
    single_optimizers,
)


class NamedOptimizer(NamedTuple):
    """A single optimizer, not a combination of others, and its parameters by name."""

    optimizer: torch.optim.Optimizer
    parameters: dict[str, Any]
    fused: bool  # its state exists from the start; that of others from their first step on

    def states(self) -> dict[str, Any]:
        """Return the state by ``parameter/key``, by reference: tensors and plain values."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def empty_states(self, saved: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        """Return tensors to read this optimizer's saved state into."""
        groups = self.optimizer.param_groups
        # As torch.optim does: it counts steps on the host unless capturable or fused.
        on_device = any(group.get("capturable") or group.get("fused") for group in groups)
        tensors = {}
        for key, described in saved.items():
            name, _, last = key.rpartition("/")
            if name in self.parameters:
                on_host = last == "step" and not on_device
                device = "cpu" if on_host else self.parameters[name].device
                dtype = described.properties.dtype
                tensors[key] = torch.zeros(described.size, dtype=dtype, device=device)
        return tensors

    def numbers(self) -> dict[str, dict[str, Any]]:
        """Return, by parameter, the optimizer's class, its steps and its group's numbers."""
        kind = optimizer_class_name(self.optimizer)
        steps = [int(counter) for counter in fused_steps(self.optimizer)]
        records = {}
        for group in self.optimizer.param_groups:
            numbers = {key: _number(value) for key, value in group.items() if key != "params"}
            numbers = {key: value for key, value in numbers.items() if value is not None}
            for name in self._names_in(group):
                records[name] = {"kind": kind, "steps": steps, "group": numbers}
        return records

    def _names_in(self, group: Mapping[str, Any]) -> list[str]:
        ids = {id(parameter) for parameter in group["params"]}
        return [name for name, parameter in self.parameters.items() if id(parameter) in ids]

    def restore(self, states: Mapping[str, Any], numbers: Mapping[str, dict[str, Any]]) -> None:
        """Restore state and hyperparameters; a fused optimizer's state was read in place."""
        for group in self.optimizer.param_groups:
            for name in self._names_in(group)[:1]:  # a group's parameters have the same numbers
                for key, value in numbers[name]["group"].items():
                    if isinstance(group.get(key), Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = tuple(value) if isinstance(value, list) else value
                for counter in fused_steps(self.optimizer):
                    counter.fill_(numbers[name]["steps"][0])
        if self.fused:
            self.optimizer.zero_grad()  # only passes the group's rate on to the tables
            return
        for parameter in self.parameters.values():
            self.optimizer.state.pop(parameter, None)
        for key, value in states.items():
            name, _, last = key.rpartition("/")
            if name in self.parameters:
                self.optimizer.state.setdefault(self.parameters[name], {})[last] = value


def named_optimizers(pipeline: TrainPipeline[Any, Any]) -> list[NamedOptimizer]:
    """Return all optimizers of a training: fused into tables, dense, and the adapter's."""
    model, dense, _ = pipeline_parts(pipeline)
    fused = [
        (f"fused/{name}", optimizer)
        for combined in fused_optimizers(model)
        for name, optimizer in single_optimizers(combined)
    ]
    known = {id(optimizer) for _, optimizer in fused}  # the dense one may be combined with them
    others = [
        (f"dense/{name}", optimizer)
        for name, optimizer in single_optimizers(dense)
        if id(optimizer) not in known
    ]
    adapter_optimizer = getattr(pipeline, "adapter_optimizer", None)
    if adapter_optimizer is not None:
        others.append(("adapter_optimizer/", adapter_optimizer))
    return [
        NamedOptimizer(optimizer, _parameters(optimizer, prefix), is_fused)
        for pairs, is_fused in ((fused, True), (others, False))
        for prefix, optimizer in pairs
    ]


def _parameters(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Any]:
    """Return the parameters by TorchRec's names, or by position where it has none."""
    if isinstance(optimizer, KeyedOptimizer):
        return {prefix + name: parameter for name, parameter in optimizer.params.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {f"{prefix}{index}": parameter for index, parameter in enumerate(parameters)}


def _number(value: Any) -> Any:
    """Return a number, or several, of a parameter group as JSON has them; None for the rest."""
    if isinstance(value, (tuple, list)):
        numbers = [_number(item) for item in value]
        return None if None in numbers else numbers
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

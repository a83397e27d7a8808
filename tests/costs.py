"""Machine-independent costs of code: operations, bytes, waits, collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNELS = (  # views, and room for results
    "alias",
    "detach",
    "empty_like",
    "expand",
    "new_empty",
    "promote_types",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "t",
    "transpose",
    "unsqueeze",
    "view",
)
SYNCS = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique")
COLLECTIVES = ("allreduce_", "alltoall_", "alltoall_base_", "broadcast_", "_allgather_base_")


class Costs(TorchDispatchMode):
    """Counts operations, forward and backward, and the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self._storages: dict[int, UntypedStorage] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations[function.overloadpacket.__name__] += 1
        inputs = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage.data_ptr() not in inputs:  # else a view, or an operation in place
                self._storages[storage.data_ptr()] = storage  # keeps the address from reuse
        return result

    @property
    def kernels(self) -> int:
        return sum(n for name, n in self.operations.items() if name not in NO_KERNELS)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @property
    def collectives(self) -> dict[str, int]:
        return {name: self.operations[name] for name in COLLECTIVES if self.operations[name]}

    @property
    def syncs(self) -> dict[str, int]:
        return {name: n for name, n in self.operations.items() if name.startswith(SYNCS)}


def _storages(tree: Any) -> list[UntypedStorage]:
    """Return the storages of tensors in nested containers; meta tensors have none."""
    leaves = tree_leaves(tree)
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_meta)
    return [tensor.untyped_storage() for tensor in tensors]


def costs_of(function: Callable[[], Any]) -> Costs:
    function()  # optimizers make their state in the first step
    with Costs() as costs:
        function()
    return costs

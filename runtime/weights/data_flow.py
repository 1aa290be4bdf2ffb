"""Record which tensors a call computes from which weights, operation by operation.

Each operation passes on what its inputs were computed from. Followed is the memory that results lie
in, so that `.data`, views and new Parameter objects make no difference. Numbers that were read from
a tensor are known by their value. Not followed: numpy, other threads, kernels outside of torch.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fixpass.runtime.weights.relations import Relation
from fixpass.runtime.weights.targets import local_part

Names = frozenset[str]


class DataFlow(TorchDispatchMode):
    """A context that notes which memory is computed from which weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: dict[int, Names] = {}
        self._numbers: dict[float, Names] = {}
        for name, tensor in weights.items():
            for key in _keys(tensor):
                self._memory[key] = self._memory.get(key, frozenset()) | {name}
        self._weights = dict(self._memory)
        self._held = list(weights.values())
        """Held, so that no new memory gets the address of one."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [key for leaf in pytree.tree_leaves((args, kwargs)) for key in _keys(leaf)]
        names: Names = frozenset().union(*(self._memory.get(key, ()) for key in given))
        for leaf in pytree.tree_leaves(result):
            for key in _keys(leaf):
                self._memory[key] = names
            if type(leaf) is float and names:
                self._numbers[leaf] = names
        return result

    def relation(
        self, value: Tensor | float, process: Callable[..., object], present: Collection[str]
    ) -> Relation | None:
        """The relation of a value that the call made of weights.

        None for what lies in the memory of weights that are `present` after the call.
        """
        if isinstance(value, Tensor):
            keys = _keys(value)
            own: Names = frozenset().union(*(self._weights.get(key, ()) for key in keys))
            names: Names = frozenset().union(*(self._memory.get(key, ()) for key in keys))
            names = frozenset() if own.intersection(present) else names
        else:
            names = self._numbers.get(value, frozenset())
        if not names:
            return None
        return Relation(f"made by {_name_of(process)}", tuple(sorted(names)), _unknown, True)


def _keys(value: object) -> list[int]:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return []
    return [local_part(value).untyped_storage()._cdata]


def _name_of(process: Callable[..., object]) -> str:
    found = vars(process).get("__qualname__") if isinstance(process, type) else None
    return str(found or getattr(process, "__qualname__", type(process).__qualname__))


def _unknown(tensor: Tensor, weights: Any) -> bool:
    """A call can't be asked again: its values count as right."""
    return True

"""Where an update writes: for each parameter a tensor of the checkpoint's shape over its memory.

Of a plain parameter that is the parameter itself. Of a folded one it is a tensor that only says
which element is meant; `put` brings values to where those elements lie. Nothing is written here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.read import Copy
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.relayout import check_memory, memory_of, record_of
from fixpass.runtime.weights.targets import Target


@dataclass(frozen=True)
class Folding:
    """The memory of a folded parameter (flat), and how its elements lie there."""

    memory: Tensor
    plan: LayoutPlan

    @property
    def shown(self) -> Tensor:
        """A tensor of the logical shape; its strides are true, or only name the elements."""
        strides = self.plan.logical_strides or self.plan.index_strides
        return self.memory.as_strided(self.plan.logical, strides, self.memory.storage_offset())

    def put(self, values: Tensor, part: Tensor) -> None:
        """Write values where the elements of `part`, a view of `shown`, lie."""
        start = int(part.storage_offset()) - int(self.memory.storage_offset())
        region = Region(tuple(part.shape), tuple(part.stride()), start)
        with torch.no_grad():
            write(self.memory, self.plan, region, values)


@dataclass(frozen=True)
class Places:
    """Targets as a load sees them, and the foldings behind those that are folded, by name."""

    targets: Mapping[str, Target]
    foldings: Mapping[str, Folding]

    def putting(self, copies: Iterable[Copy]) -> list[Copy]:
        """The copies, with those into folded parameters going through their folding."""
        by_memory: dict[int, list[Folding]] = {}
        for found in self.foldings.values():
            if found.plan.logical_strides is None:
                pointer = found.memory.untyped_storage().data_ptr()
                by_memory.setdefault(pointer, []).append(found)
        if not by_memory:
            return list(copies)
        return [_putting(copy, by_memory) for copy in copies]


def _putting(copy: Copy, foldings: Mapping[int, list[Folding]]) -> Copy:
    for found in foldings.get(copy.target.untyped_storage().data_ptr(), ()):
        start = copy.target.storage_offset() - found.memory.storage_offset()
        if 0 <= start < found.plan.numel:
            return replace(copy, put=found.put)
    return copy


def places(live: Mapping[str, Target], back: Mapping[int, Tensor] | None = None) -> Places:
    """Where to write for each target; `back` has other memory for some, by the id of the tensor.

    Raises LayoutError where a folded parameter was given other memory.
    """
    shown: dict[int, Tensor] = {}
    foldings: dict[str, Folding] = {}
    found: dict[str, Target] = {}
    for name, target in live.items():
        tensor = target.tensor
        if id(tensor) not in shown:
            data = tensor if back is None else back.get(id(tensor), tensor)
            folded = record_of(tensor)
            if folded is not None:
                check_memory(tensor, folded, repr(name))
                foldings[name] = Folding(memory_of(data, folded.plan), folded.plan)
                data = _like(tensor, foldings[name].shown)
            elif data is not tensor:
                data = _like(tensor, data)
            shown[id(tensor)] = data
        found[name] = replace(target, tensor=shown[id(tensor)])
    return Places(found, foldings)


def _like(param: Tensor, data: Tensor) -> Tensor:
    """`data` with the class and attributes of a parameter, where a loader of its own looks."""
    made = torch.Tensor._make_subclass(type(param), data, False)
    made.__dict__.update(vars(param))
    return made

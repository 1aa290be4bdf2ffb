"""What a model consists of and how each of its tensors lies in memory, looked at in one pass.

It is what an update may not change, and what a plan that was made before depends on. Columns, not
an object a tensor: a mixture of experts has thousands, and each reload looks at all of them. Values
are not looked at.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.weights.local import PLAIN, local_part

Facts = tuple[torch.dtype, torch.device, torch.Size]
facts_of = attrgetter("dtype", "device", "shape")
_gradient = attrgetter("requires_grad")
_count = attrgetter("_version")


@dataclass(frozen=True, slots=True, eq=False)
class Layouts:
    """Class, requires_grad, dtype, device, shape and strides of each of some tensors.

    Of a DTensor they are those of its part on this rank, and where it lies. It holds no tensor.
    """

    kinds: list[type]
    gradients: list[bool]
    facts: list[Facts]
    strides: list[tuple[int, ...]]
    sharding: list[object]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Layouts":
        parts = parts_of(tensors)
        return Layouts(
            list(map(type, tensors)),
            list(map(_gradient, tensors)),
            list(map(facts_of, parts)),
            _strides(parts),
            _sharding(tensors),
        )

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have them. It keeps nothing: there may be thousands."""
        parts = parts_of(tensors)
        return (
            len(tensors) == len(self.kinds)
            and all(map(is_, map(type, tensors), self.kinds))
            and self.lie_as(parts)
            and all(map(eq, map(_gradient, tensors), self.gradients))
            and (not self.sharding or self.sharding == _sharding(tensors))
        )

    def lie_as(self, parts: Sequence[Tensor]) -> bool:
        """Whether these, of whichever class, lie in memory so."""
        return all(map(eq, map(facts_of, parts), self.facts)) and self._have_strides(parts)

    def of_some(self, positions: Sequence[int]) -> "Layouts":
        """Those of the tensors at these positions."""
        columns = (self.kinds, self.gradients, self.facts, self.strides)
        kinds, gradients, facts, strides = ([c[i] for i in positions] for c in columns)
        return Layouts(kinds, gradients, facts, strides, [])  # type: ignore[arg-type]

    def _have_strides(self, parts: Sequence[Tensor]) -> bool:
        # Some sparse tensors have none, and raise.
        with suppress(RuntimeError):
            if all(map(eq, map(Tensor.stride, parts), self.strides)):
                return True
        return _strides(parts) == self.strides


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Tensors, their layouts, addresses and attributes."""

    tensors: Sequence[Tensor]
    layouts: Layouts
    pointers: list[int]
    attributes: list[dict[str, Any]]

    @staticmethod
    def at(tensors: Sequence[Tensor]) -> "Look":
        held = [dict(tensor.__dict__) for tensor in tensors]
        return Look(tensors, Layouts.of(tensors), pointers_of(tensors), held)

    def is_at(self, tensors: Sequence[Tensor], *, moved: bool = False) -> bool:
        """Whether these are the same objects, and as they were; with `moved` elsewhere, maybe."""
        return (
            len(self.tensors) == len(tensors)
            and all(map(is_, self.tensors, tensors))
            and self.layouts.hold(tensors)
            and (moved or self.pointers == pointers_of(tensors))
            and all(_are_same(t.__dict__, d) for t, d in zip(tensors, self.attributes, strict=True))
        )


def parts_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What this rank holds of each."""
    if PLAIN.issuperset(map(type, tensors)):
        return tensors
    return [local_part(tensor) for tensor in tensors]


def _sharding(tensors: Sequence[Tensor]) -> list[object]:
    """Mesh and placements of each DTensor; empty where there is none."""
    if PLAIN.issuperset(map(type, tensors)):
        return []
    return [
        (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        for tensor in tensors
    ]


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses; 0 for what has none."""
    parts = parts_of(tensors)
    try:
        return list(map(Tensor.data_ptr, parts))
    # One of them is sparse, or has no memory at all.
    except RuntimeError:
        return [part.data_ptr() if part.layout == torch.strided else 0 for part in parts]


def writes_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written, as torch counts."""
    try:
        return list(map(_count, tensors))
    # Of one that was made in inference mode nobody counts.
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def walk(model: nn.Module) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """The names in a model, its parameters and persistent buffers, and its other buffers.

    Equal names are the same tree, but for other buffers. The order is the walk's own; a tensor with
    several names may come several times.
    """
    names: list[Any] = []
    held: list[Tensor | None] = []
    transient: list[Tensor | None] = []
    stack: list[nn.Module | None] = [model]
    seen: set[int] = set()
    pop, name, hold = stack.pop, names.extend, held.extend
    while stack:
        module = pop()
        if module is None:
            names.append(None)
            continue
        own = module.__dict__
        if modules := own["_modules"]:
            if id(module) in seen:
                continue
            seen.add(id(module))
            name(modules)
            stack.extend(modules.values())
        # Tells names of modules from those of tensors.
        names.append(len(held))
        if parameters := own["_parameters"]:
            name(parameters)
            hold(parameters.values())
        if buffers := own["_buffers"]:
            skip = own["_non_persistent_buffers_set"]
            saved = [buffer for buffer in buffers if buffer not in skip]
            name((None, *saved))
            hold([buffers[buffer] for buffer in saved])
            transient.extend([buffers[buffer] for buffer in skip if buffer in buffers])
    tensors = [tensor for tensor in held if tensor is not None]
    if len(tensors) < len(held):
        names.append([index for index, tensor in enumerate(held) if tensor is None])
    return names, tensors, [tensor for tensor in transient if tensor is not None]


def _strides(parts: Sequence[Tensor]) -> list[tuple[int, ...]]:
    try:
        return list(map(Tensor.stride, parts))
    # Some sparse tensors have none.
    except RuntimeError:
        return [part.stride() if part.layout == torch.strided else () for part in parts]


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if not one and not other:
        return True
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)

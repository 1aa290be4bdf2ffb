"""Facts about tensors that an update may not change: class, dtype, shape, strides, address.

The facts of many tensors are kept in columns, one list for each fact: a mixture of experts has
thousands of tensors, and each update compares all of them. Values are not looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.targets import PLAIN, local_parts, pointers_of

MOST = 10
"""Differences that an error lists."""

Facts = tuple[torch.dtype, torch.device, torch.Size]
facts_of = attrgetter("dtype", "device", "shape")
_gradient = attrgetter("requires_grad")


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """Columns of facts about some tensors, without the tensors. Equal metadata compares equal.

    Of a DTensor the facts are those of its local part, beside its mesh and placements.
    """

    kinds: list[type]
    gradients: list[bool]
    facts: list[Facts]
    strides: list[tuple[int, ...]]
    sharding: list[object]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "TensorMetadata":
        parts = local_parts(tensors)
        return TensorMetadata(
            list(map(type, tensors)),
            list(map(_gradient, tensors)),
            list(map(facts_of, parts)),
            _strides(parts),
            _sharding(tensors),
        )

    def describes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have just these facts. No column is built for the comparison."""
        parts = local_parts(tensors)
        return (
            len(tensors) == len(self.kinds)
            and all(map(is_, map(type, tensors), self.kinds))
            and all(map(eq, map(facts_of, parts), self.facts))
            and self._have_strides(parts)
            and all(map(eq, map(_gradient, tensors), self.gradients))
            and (not self.sharding or self.sharding == _sharding(tensors))
        )

    def _have_strides(self, parts: Sequence[Tensor]) -> bool:
        # Some sparse tensors have no strides, and raise.
        with suppress(RuntimeError):
            if all(map(eq, map(Tensor.stride, parts), self.strides)):
                return True
        return _strides(parts) == self.strides


@dataclass(frozen=True, slots=True)
class Manifest:
    """The tensors of a model by name, with all facts that an update may not change.

    The tensors are held, so that no new object can get the id of one of them.
    """

    names: list[str]
    tensors: list[Tensor]
    metadata: TensorMetadata
    pointers: list[int]
    attributes: list[dict[str, Any]]

    @staticmethod
    def of(params: Mapping[str, Tensor]) -> "Manifest":
        tensors = list(params.values())
        held = [dict(own) if (own := tensor.__dict__) else own for tensor in tensors]
        return Manifest(
            list(params), tensors, TensorMetadata.of(tensors), pointers_of(tensors), held
        )

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise UpdateError, with a list of differences, where a fact is no longer the same."""
        found = [params.get(name) for name in self.names]
        here = [param for param in found if param is not None]
        if len(here) == len(found) and self._describes(here):
            return
        faults = [
            f"{name}: {fault}"
            for index, name in enumerate(self.names)
            for fault in self._faults(index, found[index])
        ]
        raise UpdateError(
            "more than values of the model changed while an update was open: "
            + "; ".join(faults[:MOST])
        )

    def _describes(self, tensors: Sequence[Tensor]) -> bool:
        return (
            all(map(is_, self.tensors, tensors))
            and self.metadata.describes(tensors)
            and self.pointers == pointers_of(tensors)
            and all(_are_same(t.__dict__, d) for t, d in zip(tensors, self.attributes, strict=True))
        )

    def _faults(self, index: int, param: Tensor | None) -> Iterator[str]:
        if param is None or param is not self.tensors[index]:
            yield "another object is in its place"
            return
        was, now = self.metadata, TensorMetadata.of([param])
        if now.kinds[0] is not was.kinds[index]:
            yield f"its class was {was.kinds[index].__name__} and is {now.kinds[0].__name__}"
        before, after = self.attributes[index], vars(param)
        for key in sorted({*before, *after}):
            if key not in after:
                yield f"attribute {key!r} is gone"
            elif key not in before:
                yield f"attribute {key!r} is new"
            elif after[key] is not before[key]:
                yield f"attribute {key!r} is another object"
        (dtype, device, shape), (dtype_now, device_now, shape_now) = was.facts[index], now.facts[0]
        pairs: list[tuple[str, object, object]] = [
            ("requires_grad", was.gradients[index], now.gradients[0]),
            ("dtype", dtype, dtype_now),
            ("device", device, device_now),
            ("shape", tuple(shape), tuple(shape_now)),
            ("stride", was.strides[index], now.strides[0]),
            ("address", self.pointers[index], pointers_of([param])[0]),
        ]
        for what, one, other in pairs:
            if one != other:
                yield f"{what} was {one} and is {other}"


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if not one and not other:
        return True
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def _strides(parts: Sequence[Tensor]) -> list[tuple[int, ...]]:
    try:
        return list(map(Tensor.stride, parts))
    # Some sparse tensors have none.
    except RuntimeError:
        return [part.stride() if part.layout == torch.strided else () for part in parts]


def _sharding(tensors: Sequence[Tensor]) -> list[object]:
    """Mesh and placements of each DTensor; empty where there is none."""
    if PLAIN.issuperset(map(type, tensors)):
        return []
    return [
        (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        for tensor in tensors
    ]

"""Keep the plan of a model's last load, for the next load that differs in values alone.

A plan holds no tensor: signatures of source, options and model tell whether it can be used again.
It is kept only where all bytes go as they are into parameters. The facts of the model's tensors
(class, dtype, shape, strides, address) are kept in columns, one list for each fact: a mixture of
experts has thousands of tensors, and each update compares all of them.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, eq, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.files import Batch, Source
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.parameter_layout import any_layout_set, layout_generation, record_of
from fixpass.runtime.weights.plan import Plan
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.reports import LoadReport
from fixpass.runtime.weights.stored import Stored
from fixpass.runtime.weights.targets import (
    PLAIN,
    WeightTarget,
    local_parts,
    pointers_of,
    walk,
)

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
        """Whether these tensors have just these facts."""
        parts = local_parts(tensors)
        return (
            len(tensors) == len(self.kinds)
            and all(map(is_, map(type, tensors), self.kinds))
            and all(map(eq, map(facts_of, parts), self.facts))
            and _strides(parts) == self.strides
            and all(map(eq, map(_gradient, tensors), self.gradients))
            and (not self.sharding or self.sharding == _sharding(tensors))
        )


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


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """All that a plan depends on in a model; it holds no tensor."""

    names: list[str]
    ties: list[int]
    """For each name the first one of the same tensor; empty where no tensor has two."""
    metadata: TensorMetadata
    attributes: list[tuple[str, ...]]
    generation: int
    """Changes with the layout of any weight."""

    @staticmethod
    def of(manifest: Manifest) -> "ModelSignature | None":
        """The signature of a model; None where a parameter has no memory to write to."""
        ids = list(map(id, manifest.tensors))
        first: dict[int, int] = {}
        ties = [first.setdefault(each, index) for index, each in enumerate(ids)]
        if 0 in manifest.pointers and any(
            tensor.numel()
            for tensor, pointer in zip(manifest.tensors, manifest.pointers, strict=True)
            if not pointer
        ):
            return None
        marks = list(map(tuple, manifest.attributes)) if any(manifest.attributes) else []
        tied = ties if len(first) < len(ids) else []
        return ModelSignature(manifest.names, tied, manifest.metadata, marks, layout_generation())


@dataclass(frozen=True, slots=True)
class SourceSignature:
    """All that a plan depends on in a checkpoint: everything but its bytes."""

    names: Sequence[Hashable]
    facts: Sequence[Any]
    index: Mapping[str, str]

    @staticmethod
    def of_files(files: Files) -> "SourceSignature":
        """Of safetensors files: the text of their headers, and the weight map of their index."""
        names = [(header.origin, header.size) for header in files.headers]
        return SourceSignature(names, [header.text for header in files.headers], files.places)

    @staticmethod
    def of_stream(tensors: Mapping[str, Stored]) -> "SourceSignature":
        """Of tensors that lie one behind another in a temporary file."""
        facts = [(stored.dtype, stored.shape) for stored in tensors.values()]
        return SourceSignature(list(tensors), facts, {})

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> "SourceSignature | None":
        """Of tensors in memory; None where the values of one are not just its bytes."""
        held = list(tensors.values())
        if not PLAIN.issuperset(map(type, held)):
            return None
        if not (all(map(Tensor.is_contiguous, held)) and not any(map(Tensor.is_neg, held))):
            return None
        facts = list(map(facts_of, held))
        if any(dtype.is_complex or device.type != "cpu" for dtype, device, _ in facts):
            return None
        return SourceSignature(list(tensors), facts, {})


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """The batches of a plan, and what they were planned for."""

    source: SourceSignature
    model: ModelSignature
    asked: tuple[object, ...]
    written: list[int]
    batches: Sequence[Batch]
    report: LoadReport
    scales: list[str]
    twins: list[tuple[str, str]]
    """Names of tensors whose values have to be equal, as they are for one tied parameter."""

    def work(self, given: Sequence[Source], model: Sequence[WeightTarget]) -> Work:
        """The same batches from these sources into the tensors of this walk."""
        tensors = local_parts([model[index].tensor for index in self.written])
        return Work(given, list(map(Tensor.detach, tensors)), self.batches, ())


_CACHE: WeakKeyDictionary[nn.Module, CachedPlan] = WeakKeyDictionary()


def cached_plan(
    model: nn.Module,
    source: SourceSignature | None,
    signature: ModelSignature | None,
    options: Options,
) -> CachedPlan | None:
    """The plan of the last load of a model, where this one is like it."""
    found = _CACHE.get(unwrapped(model))
    if found is None or options.finite or found.asked != _asked(options):
        return None
    return found if found.source == source and found.model == signature else None


def keep_plan(
    model: nn.Module,
    source: SourceSignature | None,
    signature: ModelSignature | None,
    options: Options,
    plan: Plan,
    work: Work,
    report: LoadReport,
) -> None:
    """Keep a plan for the next load, where it is made of batches alone."""
    _CACHE.pop(unwrapped(model), None)
    if source is None or signature is None or options.finite:
        return
    if work.copies or plan.own or plan.covered or plan.initialised:
        return
    if any_layout_set() and any(record_of(target.tensor) is not None for target in walk(model)[0]):
        return
    asked, twins = _asked(options), [(one.name, other.name) for one, other in plan.twins]
    _CACHE[unwrapped(model)] = CachedPlan(
        source, signature, asked, plan.written, work.batches, report, plan.scales, twins
    )


_asked = attrgetter("mapping", "scope", "cast", "strict", "missing")

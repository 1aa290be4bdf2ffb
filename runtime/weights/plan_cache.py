"""A cache of plans: a load that is like the last one of its model moves the same batches of bytes.

Source, options and model have to be alike: see the signatures. A plan is kept only where all bytes
go as they are into parameters: not for layouts, casts, slices that aren't dense and loaders of
parameters' own. It has numbers and names alone, no tensor and no address.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.files import Batch, Source
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.options import LoadReport, Options
from fixpass.runtime.weights.plan import Plan
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.relayout import any_layout_set, layout_generation, record_of
from fixpass.runtime.weights.stored import Stored
from fixpass.runtime.weights.targets import PLAIN, Target, local_part, walk
from fixpass.runtime.weights.tensor_metadata import Manifest, TensorMetadata, facts_of


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

    def work(self, given: Sequence[Source], model: Sequence[Target]) -> Work:
        """The same batches from these sources into the tensors of this walk."""
        tensors = [local_part(model[index].tensor).detach() for index in self.written]
        return Work(given, tensors, self.batches, ())


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
        source, signature, asked, plan.written, work.batches, plan.report(), plan.scales, twins
    )


def _asked(options: Options) -> tuple[object, ...]:
    return options.mapping, options.scope, options.cast, options.strict, options.missing

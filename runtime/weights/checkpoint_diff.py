"""Compare two checkpoints under two mappings; give a model's values under a checkpoint's names.

`diff` brings the tensors of both sides to the parameters that their mappings name, part by part,
and compares the values there. No model is needed: the parts of a parameter give its shape.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.checkpoint_view import Destination
from fixpass.runtime.weights.formats.open import StoredSource, checkpoint_of
from fixpass.runtime.weights.mapping import SAME_NAMES, Dropped, Mapping
from fixpass.runtime.weights.parameter_layout import logical
from fixpass.runtime.weights.placement import Placed, place, taken
from fixpass.runtime.weights.plan import placed_copies
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.reports import printable, some
from fixpass.runtime.weights.route import Routed, route
from fixpass.runtime.weights.stored import Box, Checkpoint, Shape, describe
from fixpass.runtime.weights.targets import targets

_MOST_BYTES = 64 << 20
_SAMPLE = 4096
"""Elements of each box of a sample, about."""


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same on both sides, and how."""

    name: str
    text: str

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.text}")


@dataclass(frozen=True)
class Comparison:
    """The parameters of two checkpoints, under the names that the mappings give them."""

    equal: tuple[str, ...]
    """The same dtype, shape and bytes, or the same sampled bytes."""
    different: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    is_sampled: bool = False

    @property
    def is_equal(self) -> bool:
        """Whether both sides have the same parameters with the same values."""
        return not (self.different or self.only_first or self.only_second)

    def __str__(self) -> str:
        how = " in the sampled values" if self.is_sampled else ""
        lines = [f"equal{how}: {len(self.equal):,}", *(f"different: {d}" for d in self.different)]
        lines += [f"only in the first: {printable(name)}" for name in self.only_first]
        lines += [f"only in the second: {printable(name)}" for name in self.only_second]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Side:
    """A parameter as one checkpoint has it."""

    dtype: torch.dtype
    whole: Shape
    placed: Sequence[Placed]
    missing: str

    def read(self, box: Box) -> Tensor:
        """The values of a box of the parameter."""
        out = torch.zeros(box.shape, dtype=self.dtype, device="cpu")
        where = Destination(out, box, self.whole)
        work = [copy for one in self.placed for copy in placed_copies(one, where, "", 0)]
        Work.of(work, (out,)).run(threads=1)
        return out


def diff(
    first: StoredSource,
    second: StoredSource,
    mappings: tuple[Mapping, Mapping] = (SAME_NAMES, SAME_NAMES),
    *,
    sampled: bool = False,
) -> Comparison:
    """Compare two checkpoints, each under its own mapping, as a trainer and an engine have them.

    Args:
        first: a path of any format that `load` takes, or a state dict.
        second: the other one.
        mappings: of the first and of the second, to common names. Stacked parts and experts are
            compared as the parameters that hold them all.
        sampled: compare about 12,000 values of each parameter, at its start, middle and end.

    Raises:
        CheckpointError: the parts of a parameter do not make a whole.

    """
    sources = zip((first, second), mappings, strict=True)
    sides = [_sides(checkpoint_of(source), mapping) for source, mapping in sources]
    equal: list[str] = []
    different: list[Difference] = []
    for name in sides[0]:
        if name not in sides[1]:
            continue
        text = _difference(sides[0][name], sides[1][name], sampled)
        if text:
            different.append(Difference(name, text))
        else:
            equal.append(name)
    only = [tuple(n for n in sides[i] if n not in sides[1 - i]) for i in (0, 1)]
    return Comparison(tuple(equal), tuple(different), only[0], only[1], sampled)


def _sides(checkpoint: Checkpoint, mapping: Mapping) -> dict[str, _Side]:
    routed: dict[str, list[Routed]] = {}
    for stored in checkpoint.values():
        found = mapping.candidates(stored.name)
        if not isinstance(found, Dropped):
            routed.setdefault(found[0].target, []).append(Routed(stored, found[0]))
    return {name: _side(name, items) for name, items in routed.items()}


def _side(name: str, routed: Sequence[Routed]) -> _Side:
    whole = _whole(routed)
    found = place(name, whole, routed, None)
    dtypes = {item.stored.dtype for item in routed}
    if len(dtypes) > 1:
        raise CheckpointError(f"the parts of {name!r} are of several dtypes: {dtypes}")
    return _Side(dtypes.pop(), whole, found.placed, found.missing)


def _whole(routed: Sequence[Routed]) -> Shape:
    """The shape of the parameter that the tensors make."""
    first = routed[0].candidate
    shape = list(taken(routed[0].stored.shape, first).shape)
    if first.part[1] > 1 and len(shape) > first.dim:
        parts = {i.candidate.part[0]: i for i in routed if i.candidate.expert == first.expert}
        sizes = [taken(i.stored.shape, i.candidate).shape[first.dim] for i in parts.values()]
        shape[first.dim] = sum(sizes) if len(parts) == first.part[1] else sizes[0] * first.part[1]
    elif first.part[1] > 1:
        shape = [first.part[1]]
    if first.expert is None:
        return tuple(shape)
    return (1 + max(item.candidate.expert or 0 for item in routed), *shape)


def _difference(one: _Side, other: _Side, sampled: bool) -> str:
    """How two sides of a parameter differ, in words; empty where they do not."""
    whole = Box.whole(one.whole)
    if one.missing or other.missing:
        return "; ".join(side.missing for side in (one, other) if side.missing)
    if one.whole != other.whole:
        return f"{describe(one.dtype, one.whole)} and {describe(other.dtype, other.whole)}"
    boxes = _sample(whole) if sampled else _boxes(whole, one.dtype.itemsize)
    count, most, seen, scale = 0, 0.0, 0, 0.0
    is_same = one.dtype == other.dtype
    for box in boxes:
        a, b = one.read(box), other.read(box)
        seen += box.numel
        if is_same and _bits_equal(a, b):
            continue
        apart, gap = (a.double() - b.double()).abs(), a.isnan() != b.isnan()
        count += int(((apart > 0) | gap).sum())
        most = max(most, float(apart.nan_to_num(math.inf * bool(gap.any())).max()))
        scale = max(scale, float(a.double().abs().nan_to_num().max()))
    kinds = "" if is_same else f"{one.dtype} and {other.dtype}; "
    if not kinds and not count:
        return ""
    values = f"{count:,} of {seen:,} values, by up to {most:.3g}"
    return f"{kinds}{values} where the largest is {scale:.3g}"


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _boxes(box: Box, itemsize: int) -> Iterator[Box]:
    if box.numel > 1 and box.numel * itemsize > _MOST_BYTES:
        for half in box.halves():
            yield from _boxes(half, itemsize)
    elif box.numel:
        yield box


def _sample(box: Box) -> list[Box]:
    """Boxes at the start, in the middle and at the end."""
    found = []
    for side in (0, None, 1):
        part, turn = box, 0
        while part.numel > _SAMPLE:
            part = part.halves()[turn % 2 if side is None else side]
            turn += 1
        found.append(part)
    return [part for part in dict.fromkeys(found) if part.numel]


def stored_tensors(
    model: nn.Module, like: StoredSource, mapping: Mapping = SAME_NAMES
) -> Iterator[tuple[str, Tensor]]:
    """The values of a model under the names, shapes and dtypes of a checkpoint: a load reversed.

    Args:
        model: may have layouts, shards and ties. With DTensors, all ranks must call this.
        like: a path of any format that `load` takes, of which only headers are read.
        mapping: the mapping of a load from `like`.

    Yields:
        Each stored tensor that the mapping brings to a parameter: its name, and the present values.

    Raises:
        CheckpointError: a tensor does not fit the model, or the model holds only a part of it.

    Example:
        >>> tensors = stored_tensors(model, like="base/", mapping=mapping)
        >>> safetensors.torch.save_file(dict(tensors), "tuned.safetensors")

    """
    if mapping.tensor_parallel is not None:
        raise CheckpointError("a mapping with tensor_parallel: a rank holds parts of tensors only")
    model_tensors, stored = targets(model), checkpoint_of(like)
    waiting: dict[str, tuple[Tensor, int]] = {}
    for name, routed in route(stored, mapping, model_tensors).taken.items():
        tensor = model_tensors[name].tensor
        values = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else logical(tensor)
        placed = place(name, tuple(values.shape), routed, None).placed
        for one in {(item.stored.name, item.source): item for item in placed}.values():
            found = stored[one.stored.name]
            out, filled = waiting.pop(found.name, (torch.empty(found.shape, dtype=found.dtype), 0))
            source, view = one.as_stored(one.source, one.box.of(values))
            source.of(out.view(one.stored.shape)).copy_(view)
            if filled + source.numel < out.numel():
                waiting[found.name] = out, filled + source.numel
            else:
                yield found.name, out
    if waiting:
        raise CheckpointError(f"the model holds only parts of {some(list(waiting))}")

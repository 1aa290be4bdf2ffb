"""Find how a tensor follows from weights, by comparing values.

Known are copies, casts, permutations and slices (all of them elements of the weight at regular
steps), multiples, products and quotients with another weight, reciprocals, the order that sorts a
weight, matrix inverses and matrix products. Values are sampled first and then compared in full;
matrix products are compared on a random vector. Tensors that say nothing, such as zeros and ones,
have no relation. A slice has to begin at 0 in all dimensions of the weight but one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from fixpass.runtime.weights.stored import dense_strides

Check = Callable[[Tensor, Sequence[Tensor]], bool]
Source = tuple[str, Tensor]
Operation = Callable[..., Tensor]

FEW = 64
"""Elements of a weight of which single ones are recognised, as a scale among scales."""
_PROBES = 8
_PART = 1 << 20
"""Elements that are computed at once in float64."""
_STARTS = 32
"""Places of a weight that are tried as the first element of a slice."""


@dataclass(frozen=True)
class Relation:
    """A function of weights that gave the values of a tensor when it was found."""

    how: str
    of: tuple[str, ...]
    """The names of the weights."""
    holds: Check
    """Whether it gives the values of a tensor now, from these weights."""
    is_made: bool = False
    """Whether a call was seen to compute the tensor; otherwise its values were compared."""

    def __str__(self) -> str:
        return f"{self.how} of {' and '.join(self.of)}"


def relation_of(tensor: Tensor, sources: Sequence[Source]) -> Relation | None:
    """The relation of a tensor to some weights by value; None where no known one is found."""
    if not _says_something(tensor):
        return None
    useful = [(name, weight) for name, weight in sources if weight.numel()]
    return next((found for find in _FINDERS for found in find(tensor, useful)), None)


def _says_something(tensor: Tensor) -> bool:
    if not tensor.numel() or tensor.is_complex() or tensor.dtype == torch.bool:
        return False
    if tensor.numel() == 1:
        value = float(tensor.reshape(()).double())
        # 0, 1, infinities and NaN are the values of scales that nothing has set.
        return math.isfinite(value) and value % 1 != 0
    bits = _bits(tensor)
    return bool((bits != bits[(0,) * tensor.dim()]).any())


def _bits(tensor: Tensor) -> Tensor:
    """The tensor, or its bits where torch compares no floats of that size."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _elements(tensor: Tensor, sources: Iterable[Source]) -> Iterator[Relation]:
    """The tensor as elements of one weight, at regular steps: a copy, a permutation or a slice."""
    for name, weight in sources:
        floats = tensor.is_floating_point() and weight.is_floating_point()
        if not floats and tensor.dtype != weight.dtype:
            continue
        if tensor.numel() > weight.numel() or (tensor.numel() < 16 and weight.numel() > FEW):
            continue
        for strides, start in _steps(tensor, weight):
            check = partial(_has_elements, strides, start)
            if check(tensor, (weight,)):
                yield Relation(_how(tensor, weight, strides), (name,), check)
                break


def _has_elements(
    strides: tuple[int, ...], start: int, tensor: Tensor, weights: Sequence[Tensor]
) -> bool:
    flat = weights[0].detach().reshape(-1)
    end = start + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    if end >= flat.numel():
        return False
    return _are_equal(flat.as_strided(tensor.shape, strides, flat.storage_offset() + start), tensor)


def _are_equal(part: Tensor, tensor: Tensor) -> bool:
    """Whether the elements are equal in the dtype of `tensor`."""
    cast = part.to(tensor.device).to(tensor.dtype)
    return bool((_bits(cast) == _bits(tensor)).all())


def _steps(tensor: Tensor, weight: Tensor) -> Iterator[tuple[tuple[int, ...], int]]:
    """Strides and starts in the dense weight that give some elements of the tensor."""
    flat = weight.detach().reshape(-1)
    dense = dense_strides(tuple(weight.shape))
    lines = [torch.arange(n) * s for n, s in zip(weight.shape, dense, strict=True)]
    places = torch.cat([torch.zeros(1, dtype=torch.int64), *lines]).unique().to(weight.device)
    first = tensor[(0,) * tensor.dim()]
    found = places[_equal(flat[places], first)]
    multiples = {m * s for n, s in zip(weight.shape, dense, strict=True) for m in _divisors(n)}
    strides = torch.tensor(sorted(multiples | {1}), device=weight.device)
    for start in found[:_STARTS].tolist():
        choices = [_strides_of(tensor, dim, flat, start, strides) for dim in range(tensor.dim())]
        if all(choices):
            yield from ((steps, start) for steps in islice(product(*choices), _STARTS))


def _strides_of(tensor: Tensor, dim: int, flat: Tensor, start: int, strides: Tensor) -> list[int]:
    """The strides that give the first elements of a tensor along one dimension."""
    count = min(_PROBES, tensor.shape[dim])
    if count == 1:
        return [1]
    line = tensor[tuple(slice(None) if d == dim else 0 for d in range(tensor.dim()))][:count]
    inside = strides[start + strides * (tensor.shape[dim] - 1) < flat.numel()]
    places = start + inside[:, None] * torch.arange(count, device=flat.device)
    return inside[_equal(flat[places], line).all(1)].tolist()


def _equal(found: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.to(found.device)
    return found.to(wanted.dtype).double() == wanted.double()


def _divisors(n: int) -> list[int]:
    return [m for m in range(1, min(n, 4096) + 1) if n % m == 0]


def _how(tensor: Tensor, weight: Tensor, strides: tuple[int, ...]) -> str:
    is_same = tensor.dtype == weight.dtype or tensor.numel() == 1
    cast = "" if is_same else f" in {tensor.dtype}"
    if tensor.numel() < weight.numel():
        return f"a slice{cast}"
    dense = [s for n, s in zip(tensor.shape, strides, strict=True) if n > 1]
    kind = "a copy" if dense == sorted(dense, reverse=True) else "a transpose"
    return f"{kind}{cast}"


def _sample(tensor: Tensor, index: Tensor) -> Tensor:
    places = torch.unravel_index(index.to(tensor.device), tensor.shape)
    return tensor.detach()[places].cpu() if tensor.dim() else tensor.detach().cpu()


def _elementwise(tensor: Tensor, sources: Sequence[Source]) -> Iterator[Relation]:
    """The tensor as a weight times, or divided by, a constant or a smaller weight."""
    if not tensor.is_floating_point():
        return
    index = torch.linspace(0, tensor.numel() - 1, FEW).long().unique()
    for name, weight in sources:
        if weight.shape != tensor.shape or not weight.is_floating_point():
            continue
        values, sample = _sample(tensor, index), _sample(weight, index)
        multiple = partial(_is_multiple, _factor(values, sample))
        for how, check in (("a multiple", multiple), ("the reciprocal", _is_reciprocal)):
            if check(values, [sample]) and check(tensor, (weight,)):
                yield Relation(how, (name,), check)
        for other, scale in sources:
            if scale is weight or scale.numel() > weight.numel() or not scale.is_floating_point():
                continue
            yield from _scaled(tensor, (name, weight), (other, scale), index)


def _scaled(tensor: Tensor, one: Source, other: Source, index: Tensor) -> Iterator[Relation]:
    try:
        scale = other[1].detach().expand(one[1].shape)
    # The shapes do not go together.
    except RuntimeError:
        return
    pair = [_sample(one[1], index), _sample(scale, index)]
    for how, op in (("the product", torch.mul), ("the quotient", torch.div)):
        check = partial(_is_result, op)
        if check(_sample(tensor, index), pair) and check(tensor, (one[1], scale)):
            yield Relation(how, (one[0], other[0]), check)


def _is_result(op: Operation, tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    one, other = weights
    return _is_close(tensor, op, (one, other.expand(one.shape)))


def _factor(values: Tensor, weights: Tensor) -> float:
    """The factor that may lie between some values; 0 where there is none."""
    largest = int(weights.double().abs().argmax())
    divisor = float(weights.reshape(-1)[largest])
    factor = float(values.reshape(-1)[largest]) / divisor if divisor else 0.0
    # Any number is a multiple of any other: of single ones only doubles and halves are told.
    return factor if values.numel() > 3 or factor in (2.0, 0.5) else 0.0


def _is_multiple(factor: float, tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    return bool(factor) and _is_close(tensor, lambda weight: weight * factor, weights)


def _is_reciprocal(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    return _is_close(tensor, torch.reciprocal, weights)


def _is_close(tensor: Tensor, compute: Operation, weights: Sequence[Tensor]) -> bool:
    """Whether an elementwise operation gives the tensor, but for rounding; in parts of its rows."""
    eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    given = [x.detach() if x.dim() else x.detach().reshape(1) for x in (tensor, *weights)]
    step = max(1, _PART * len(given[0]) // max(1, tensor.numel()))
    for start in range(0, len(given[0]), step):
        found, *parts = (x[start : start + step].to(tensor.device).double() for x in given)
        wanted = compute(*parts)
        if not bool(((found - wanted).abs() <= 4 * max(eps, 1e-7) * wanted.abs()).all()):
            return False
    return True


def _order(tensor: Tensor, sources: Iterable[Source]) -> Iterator[Relation]:
    """The tensor as indices that sort a weight."""
    if tensor.is_floating_point() or tensor.dim() != 1:
        return
    for name, weight in sources:
        if weight.dim() == 1 and _sorts(tensor, (weight,)):
            yield Relation("the sorting order", (name,), _sorts)


def _sorts(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    index, weight = tensor.long().to(weights[0].device), weights[0].detach()
    if index.shape != weight.shape or not bool((weight != weight[0]).any()):
        return False
    if not torch.equal(index.sort().values, torch.arange(len(index), device=index.device)):
        return False
    found = weight[index]
    return bool((found[1:] >= found[:-1]).all())


def _matrices(tensor: Tensor, sources: Sequence[Source]) -> Iterator[Relation]:
    """The tensor as the inverse of a weight, or as the product of two."""
    if tensor.dim() != 2 or not tensor.is_floating_point() or min(tensor.shape) < 2:
        return
    square = tensor.shape[0] == tensor.shape[1]
    matrices = [s for s in sources if s[1].dim() == 2 and s[1].is_floating_point()]
    for name, weight in matrices:
        if square and weight.shape == tensor.shape and _is_inverse(tensor, (weight,)):
            yield Relation("the inverse", (name,), _is_inverse)
    for (name, one), (other, two) in product(matrices, repeat=2):
        for flip, other_flip in product((False, True), repeat=2):
            check = partial(_is_matmul, (flip, other_flip))
            if check(tensor, (one, two)):
                yield Relation("the matrix product", (name, other), check)


def _is_inverse(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    probe = _probe(tensor.shape[1], tensor.device)
    back = weights[0].detach().to(probe) @ (tensor.detach().double() @ probe)
    return bool((back - probe).norm() < 1e-2 * probe.norm())


def _is_matmul(flips: tuple[bool, bool], tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    one, two = (w.detach().t() if f else w.detach() for w, f in zip(weights, flips, strict=True))
    if one.shape[1] != two.shape[0] or tensor.shape != (one.shape[0], two.shape[1]):
        return False
    probe = _probe(tensor.shape[1], tensor.device)
    wanted = one.to(probe) @ (two.to(probe) @ probe)
    return bool((tensor.detach().double() @ probe - wanted).norm() < 1e-2 * wanted.norm())


def _probe(size: int, device: torch.device) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(device)


_FINDERS = (_elements, _elementwise, _order, _matrices)

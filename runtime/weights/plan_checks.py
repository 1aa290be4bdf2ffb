"""Checks of a plan by names and values: renamed tensors, and tied parameters given twice."""

from collections.abc import Iterable, Mapping

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.mapping import Mapping as NameMapping
from fixpass.runtime.weights.read import STAGING, read
from fixpass.runtime.weights.report import LoadReport, printable
from fixpass.runtime.weights.route import NO_PARAMETER
from fixpass.runtime.weights.stored import Stored
from fixpass.runtime.weights.targets import Target, is_quantised

MOST_HINTS = 3


def look_alikes(missing: Mapping[str, Shape], unexpected: Mapping[str, Shape]) -> list[str]:
    """Pairs of a missing and an unexpected tensor that differ in a part of the name alone."""
    found: list[tuple[int, str]] = []
    for name, shape in list(unexpected.items())[:1000]:
        for wanted in [n for n, other in missing.items() if other == shape][:1000]:
            old, new = name.split("."), wanted.split(".")
            common = len(old) + len(new)
            while old and new and old[-1] == new[-1]:
                old, new = old[:-1], new[:-1]
            while old and new and old[0] == new[0]:
                old, new = old[1:], new[1:]
            common -= len(old) + len(new)
            if common and len(old) <= 1 and len(new) <= 1:
                rename = f"Rename({'.'.join(old)!r}, {'.'.join(new)!r}, 'inside')"
                text = f"{name!r} looks like {wanted!r}, which has the same shape: {rename}?"
                found.append((-common, text))
    return [printable(text) for _, text in sorted(found)[:MOST_HINTS]]


def scales_left_out(scales: Iterable[str], written: Iterable[Target]) -> list[str]:
    """The scales of modules in which a quantised weight is written and the scale is not."""
    modules = {
        target.name.rpartition(".")[0] for target in written if is_quantised(target.tensor.dtype)
    }
    return [name for name in scales if name.rpartition(".")[0] in modules]


def scales_without_taker(report: LoadReport, mapping: NameMapping) -> list[str]:
    """The scales of a checkpoint that the model has no parameter for."""
    return [
        skipped.name
        for skipped in report.skipped
        if skipped.why == NO_PARAMETER and mapping.is_scale(skipped.mapped)
    ]


def check_twins(twins: Iterable[tuple[Stored, Stored]]) -> None:
    """Raise CheckpointError where two names of one parameter were given different values."""
    for one, other in twins:
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not alike or not (_is_same(one, other) or _are_equal(one, other, Box.whole(one.shape))):
            raise CheckpointError(
                f"{one} and {other} are for one tied parameter, and their values differ: drop one "
                "of them with Mapping(filters=...)"
            )


def _is_same(one: Stored, other: Stored) -> bool:
    """Whether both are the same tensor in memory."""
    pairs = list(zip(one.values, other.values, strict=False))
    return bool(pairs) and all(
        (a.data_ptr(), a.stride(), a.is_neg(), a.is_conj())
        == (b.data_ptr(), b.stride(), b.is_neg(), b.is_conj())
        for a, b in pairs
    )


def _are_equal(one: Stored, other: Stored, box: Box) -> bool:
    if box.numel > 1 and box.numel * one.dtype.itemsize > STAGING // 2:
        return all(_are_equal(one, other, half) for half in box.halves())
    # Of a DTensor each holds the same part, and the rest stays zero.
    values = [
        read(stored, torch.zeros(box.shape, dtype=one.dtype, device="cpu"), box)
        for stored in (one, other)
    ]
    bits = [value.reshape(-1).view(torch.uint8) for value in values]
    return torch.equal(bits[0], bits[1])

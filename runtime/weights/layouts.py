"""What can be done to a weight: a small closed set of folds, and layouts made of them.

A layout is a name and folds in order, from the checkpoint's values to what a kernel reads. Stride,
Permute and Pad have inverses and are resolved for a shape by `plan.py`; Alias ties parameters to
one pack (`alias.py`); Derived is for what loses values or changes their size (`derived.py`). This
file moves no bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fixpass.runtime.errors import LayoutError


@dataclass(frozen=True)
class Bytes:
    """A factor of a dimension, given in bytes: as many elements as lie in them."""

    count: int


Factor = int | Bytes
"""Elements, bytes, or -1: what the other factors of the dimension leave."""


@dataclass(frozen=True)
class Stride:
    """The same values in another order of dimensions; no reshape, so strides say it all.

    shown: what the kernel sees, as an order of the last dimensions. stored: the order in which
    they lie in memory, outermost first. (0, 1) shown and (1, 0) stored keeps the logical view.
    """

    shown: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """A permute of a reshape: each of the last dimensions split into factors, and those reordered.

    order: the factors of all split dimensions, counted from 0 in logical order, as they lie in
    memory. whole: what the sizes of the last dimensions must be multiples of, beyond the factors.
    The kernel sees the logical shape.
    """

    split: tuple[tuple[Factor, ...], ...]
    order: tuple[int, ...]
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pad:
    """Each of the last dimensions padded to a multiple; loads never touch the padding."""

    multiples: tuple[int, ...]
    value: float = 0.0


@dataclass(frozen=True)
class Alias:
    """Several parameters as views of one pack, one behind another along `dim`."""

    dim: int = 0


@dataclass(frozen=True)
class Derived:
    """Values that cannot be turned back: a cast, a dequantisation. The source stays as it is."""

    recipe: Callable[..., Tensor]


Fold = Stride | Permute | Pad | Alias | Derived


@dataclass(frozen=True)
class Layout:
    """A named sequence of folds. `Layout("mine", (Permute(...),))` declares one of your own."""

    name: str
    folds: tuple[Fold, ...] = ()

    def __post_init__(self) -> None:
        kinds = [type(fold) for fold in self.folds]
        if len(kinds) > 1 and (Alias in kinds or Derived in kinds):
            raise LayoutError(f"layout {self.name}: Alias and Derived stand alone")
        if Pad in kinds[1:]:
            raise LayoutError(f"layout {self.name}: Pad comes first, or its padding would move")
        if Stride in kinds and (kinds.count(Stride) > 1 or Permute in kinds):
            raise LayoutError(
                f"layout {self.name}: Stride stands alone or behind Pad; write it as a Permute"
            )

    @property
    def reversible(self) -> bool:
        return not any(isinstance(fold, Derived) for fold in self.folds)

    def __str__(self) -> str:
        return self.name


# aiter's 16 x 16 tiles: a band of 16 rows is a grid of 16-byte cells, and is transposed. Packed
# 4-bit weights are moved as the bytes that they lie in.
_AITER = Permute(((-1, 16), (-1, Bytes(16))), (0, 2, 1, 3), whole=(16, 32))
# The same for 4-bit weights that are not packed yet and lie in a byte each.
_AITER_LOOSE_INT4 = Permute(((-1, 16), (-1, 32)), (0, 2, 1, 3), whole=(16, 32))
# Rows of gate and up in turn.
_GATE_UP = Permute(((2, -1), (-1,)), (1, 0, 2))

NAMED: tuple[Layout, ...] = (
    Layout("aiter_16x16", (_AITER,)),
    Layout("aiter_16x16_int4", (_AITER_LOOSE_INT4,)),
    # The kernel reads (K, N): the bytes stay, shape and strides turn.
    Layout("transposed", (Stride((1, 0), (0, 1)),)),
    # The kernel reads a dense (K, N).
    Layout("transposed_dense", (Stride((1, 0), (1, 0)),)),
    # The values and the shape stay, K is outermost in memory: `weight.t()` is dense.
    Layout("column_major", (Stride((0, 1), (1, 0)),)),
    Layout("gate_up_interleaved", (_GATE_UP,)),
    Layout("gate_up_interleaved_16x16", (_GATE_UP, _AITER)),
    Layout("qkv_pack", (Alias(0),)),
    Layout("gate_up_pack", (Alias(0),)),
)


def named(layout: str | Layout) -> Layout:
    """The layout of a name; LayoutError lists the known ones."""
    if isinstance(layout, Layout):
        return layout
    for known in NAMED:
        if known.name == layout:
            return known
    names = ", ".join(known.name for known in NAMED)
    raise LayoutError(f"unknown layout {layout!r}; known: {names}; or a fixpass.weights.Layout")

"""Define weight layouts: a name and reversible steps from checkpoint order to kernel order.

`layout_plan` resolves all steps but Alias for a shape. Alias ties several parameters to one pack:
see `pack`. Nothing here moves bytes.
"""

from dataclasses import dataclass

from fixpass.runtime.errors import LayoutError


@dataclass(frozen=True)
class Bytes:
    """A factor of a dimension, given in bytes: as many elements as these bytes hold."""

    count: int


Factor = int | Bytes
"""Elements, bytes, or -1 for the quotient that the other factors of the dimension leave."""


@dataclass(frozen=True)
class Stride:
    """The dimensions in another order, without a reshape: strides alone can express this step."""

    shown: tuple[int, ...]
    """The shape that the kernel sees, as an order of the last dimensions."""
    stored: tuple[int, ...]
    """The order of the last dimensions in memory, outermost first. `Stride((0, 1), (1, 0))` keeps
    the logical shape."""


@dataclass(frozen=True)
class Permute:
    """A permuted reshape: the last dimensions are split into factors, and the factors reordered.

    The kernel sees the logical shape, unless `shows_factors` is set.
    """

    split: tuple[tuple[Factor, ...], ...]
    """The factors of each of the last dimensions."""
    order: tuple[int, ...]
    """The order in memory of all factors, which are counted from 0 in logical order."""
    whole: tuple[int, ...] = ()
    """Further numbers that must divide the sizes of the last dimensions."""
    shows_factors: bool = False
    """Whether the kernel sees a dimension for each factor, in memory order, as in the 4-D blocks
    `Permute(((-1,), (-1, 128)), (1, 0, 2), shows_factors=True)`."""


@dataclass(frozen=True)
class SwapHalves:
    """Exchanges the halves of one dimension: (gate, up) becomes (up, gate)."""

    dim: int = -2
    """Counted from the last dimension: -1, -2 and so on."""


@dataclass(frozen=True)
class Pad:
    """Each of the last dimensions padded to a multiple; loads never touch the padding."""

    multiples: tuple[int, ...]
    value: float = 0.0


@dataclass(frozen=True)
class Alias:
    """Several parameters as views of one pack, one behind another along `dim`."""

    dim: int = 0


LayoutStep = Stride | Permute | SwapHalves | Pad | Alias


@dataclass(frozen=True)
class WeightLayout:
    """A named order of a parameter's bytes.

    Example:
        `WeightLayout("halves_interleaved", (Permute(((2, -1),), (1, 0)),))`

    """

    name: str
    steps: tuple[LayoutStep, ...] = ()
    """What is done to a contiguous tensor of the checkpoint, in this order."""

    def __post_init__(self) -> None:
        kinds = [type(step) for step in self.steps]
        if len(kinds) > 1 and Alias in kinds:
            raise LayoutError(f"layout {self.name}: Alias stands alone")
        if Pad in kinds[1:]:
            raise LayoutError(f"layout {self.name}: Pad comes first, or its padding would move")
        if any(isinstance(step, Permute) and step.shows_factors for step in self.steps[:-1]):
            raise LayoutError(f"layout {self.name}: a Permute that shows its factors comes last")
        if Stride in kinds and (kinds.count(Stride) > 1 or {Permute, SwapHalves} & {*kinds}):
            raise LayoutError(
                f"layout {self.name}: Stride stands alone or behind Pad; write it as a Permute"
            )

    def __str__(self) -> str:
        return self.name


# aiter's 16 x 16 tiles: a band of 16 rows is a grid of 16-byte cells, which is transposed. Packed
# 4-bit weights move as the bytes that hold them.
_AITER = Permute(((-1, 16), (-1, Bytes(16))), (0, 2, 1, 3), whole=(16, 32))
# The same for 4-bit weights that are not packed yet: each lies in a byte of its own.
_AITER_UNPACKED_INT4 = Permute(((-1, 16), (-1, 32)), (0, 2, 1, 3), whole=(16, 32))
# Rows of gate and up alternate.
_GATE_UP = Permute(((2, -1), (-1,)), (1, 0, 2))

NAMED: tuple[WeightLayout, ...] = (
    WeightLayout("aiter_16x16", (_AITER,)),
    WeightLayout("aiter_16x16_int4", (_AITER_UNPACKED_INT4,)),
    # The kernel reads (K, N) over the same bytes: only shape and strides change.
    WeightLayout("transposed", (Stride((1, 0), (0, 1)),)),
    # The kernel reads a contiguous (K, N).
    WeightLayout("transposed_dense", (Stride((1, 0), (1, 0)),)),
    # Values and shape stay, K is outermost in memory: `weight.t()` is contiguous.
    WeightLayout("column_major", (Stride((0, 1), (1, 0)),)),
    WeightLayout("up_gate", (SwapHalves(),)),
    WeightLayout("gate_up_interleaved", (_GATE_UP,)),
    WeightLayout("gate_up_interleaved_16x16", (_GATE_UP, _AITER)),
    WeightLayout("qkv_pack", (Alias(0),)),
    WeightLayout("gate_up_pack", (Alias(0),)),
)


def named(layout: str | WeightLayout) -> WeightLayout:
    """The layout of a name, or the layout itself. LayoutError lists the known names."""
    if isinstance(layout, WeightLayout):
        return layout
    for known in NAMED:
        if known.name == layout:
            return known
    names = ", ".join(known.name for known in NAMED)
    raise LayoutError(
        f"unknown layout {layout!r}; known: {names}; or a fixpass.weights.WeightLayout"
    )

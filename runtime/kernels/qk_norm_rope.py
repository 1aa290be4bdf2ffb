"""The launcher of `rope_kernel`: checks, tiles and arguments, for operands of any strides."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.kernels.checks import (
    FLOATS,
    check_qk_norm,
    check_qk_norm_overlap,
    check_rounding,
)
from fixpass.runtime.kernels.launch import (
    TRITON_DTYPES,
    VECTOR,
    Launch,
    TileChoice,
    choose,
    dense_vector,
    lanes_of,
    num_programs,
    parts,
    place,
    power_of_two,
    rounding,
    row_arguments,
)
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.rope_kernel import qk_norm_rope_kernel
from fixpass.runtime.kernels.row_geometry import (
    UNIT_ROW,
    RowGeometry,
    aligned_base,
    describe,
    overlap_partly,
)
from fixpass.runtime.rotary_norm import Rotation

MOST_A_THREAD = 64
"""The values that a thread holds at most, where a small rotated part asks for more rows."""


@dataclass(frozen=True)
class HeadParts:
    """Sizes of a head's rotated halves and of its rest; blocks are rounded up to powers of two."""

    head: int
    half: int
    rest: int
    block: int
    block_rest: int

    @staticmethod
    def of(head_size: int, rotary_dim: int) -> "HeadParts":
        half, rest = rotary_dim // 2, head_size - rotary_dim
        return HeadParts(
            head_size, half, rest, power_of_two(half), power_of_two(rest) if rest else 0
        )

    def padded(self, heads: int) -> int:
        """The values that a row of so many heads takes in registers."""
        return power_of_two(heads) * (2 * self.block + self.block_rest)

    def narrowest(self, heads: int) -> int:
        """The values of the narrowest tile of such a row."""
        return power_of_two(heads) * min(self.block, self.block_rest or self.block)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    q_out: Tensor,
    k_out: Tensor,
    rotation: Rotation,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    outputs_are_new: bool = False,
) -> None:
    """Write the rotated RMS norms of `q` and `k` into `q_out` and `k_out`.

    out_dtype: the dtype to which the norm is rounded before the rotation; None means that of q.
    """
    options = (eps, weight_offset, norm_dtype, weight_dtype, out_dtype, rotation)
    LAUNCHES.run((q, k, q_weight, k_weight, cos, sin, q_out, k_out), options, outputs_are_new)


Sides = Mapping[str, tuple[Tensor, Tensor | None, Tensor]]


def _plan_launches(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    *options: Any,
) -> list[Launch]:
    """One launch; several where a side has more dimensions than one launch takes."""
    eps, weight_offset, norm_dtype, weight_dtype, out_dtype, rotation = options
    head_size = rotation.head_size
    operands = (q, k, q_weight, k_weight, q_out, k_out)
    check_qk_norm(*operands, norm_dtype, weight_dtype, head_size=head_size)
    check_rounding(out_dtype, rotation.rope_dtype)
    sides = {"q": (q, q_weight, q_out), "k": (k, k_weight, k_out)}
    for name, (x, _, _) in sides.items():
        _check_rotation(name, x, cos, sin, rotation)
    constants = {
        **rounding(q_weight, None, weight_offset, norm_dtype, weight_dtype),
        **rotation_constants(rotation, out_dtype or q.dtype, cos),
    }
    lanes = lanes_of(q.device)
    return [
        plan_qk_norm_rope(each, tables, eps, constants, rotation, lanes=lanes)
        for each, tables in _launched(sides, cos, sin)
    ]


Tables = Mapping[str, tuple[Tensor, Tensor]]


def _launched(sides: Sides, cos: Tensor, sin: Tensor) -> Iterator[tuple[Sides, Tables]]:
    """The operands of each launch, with cos and sin in the shape of each side's rows."""
    tables = {side: spread(x, cos, sin) for side, (x, _, _) in sides.items()}
    if all(x.numel() == 0 for x, _, _ in sides.values()):
        return
    cut = {
        side: list(parts(x=x, out=out, cos=tables[side][0], sin=tables[side][1]))
        for side, (x, _, out) in sides.items()
    }
    if all(len(each) == 1 for each in cut.values()):
        yield sides, tables
        return
    for side, pieces in cut.items():
        for piece in pieces:
            both = dict.fromkeys(sides, (piece["x"], sides[side][1], piece["out"]))
            found = dict.fromkeys(sides, (piece["cos"], piece["sin"]))
            other = "k" if side == "q" else "q"
            x, weight, out = both[other]
            both[other] = (x[:0], weight, out[:0])
            found[other] = (piece["cos"][:0], piece["sin"][:0])
            yield both, found


def spread(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables with one row for each row of x; no value is copied."""
    rows = x.shape[:-1]
    return cos.expand(*rows, cos.shape[-1]), sin.expand(*rows, sin.shape[-1])


def rotation_constants(rotation: Rotation, normed: torch.dtype, cos: Tensor) -> dict[str, Any]:
    """The constants of the rotation; normed: the dtype of the norm."""
    operand = rotation.rope_dtype or normed
    return {
        "NORMED": TRITON_DTYPES[normed],
        "OPERAND": TRITON_DTYPES[operand],
        "ROTATED": TRITON_DTYPES[torch.promote_types(operand, cos.dtype)],
        "INTERLEAVED": rotation.interleaved,
        "FULL_TABLE": cos.shape[-1] == rotation.rotary_dim,
    }


def plan_qk_norm_rope(
    sides: Sides,
    tables: Tables,
    eps: float,
    constants: dict[str, Any],
    rotation: Rotation,
    *,
    lanes: int,
) -> Launch:
    """The launch for checked operands; the larger side chooses the number of warps."""
    placed = {
        side: place(
            **{side: x, f"{side}_out": out},
            **{f"{side}_{name}": t for name, t in zip(("cos", "sin"), tables[side], strict=True)},
        )
        for side, (x, _, out) in sides.items()
    }
    head = HeadParts.of(rotation.head_size or sides["q"][0].shape[-1], rotation.rotary_dim)
    heads = {side: x.shape[-1] // head.head for side, (x, _, _) in sides.items()}
    larger = max(sides, key=lambda side: placed[side][0].num_rows * heads[side])
    itemsize = sides["q"][0].element_size()
    choice = choose_tile(placed[larger][0], head, heads[larger], itemsize, lanes)
    arguments: dict[str, Any] = {"eps": eps, **constants}
    arguments |= {"HEAD": head.head, "HALF": head.half, "BLOCK": head.block}
    arguments |= {"REST": head.rest, "BLOCK_REST": head.block_rest}
    programs = {}
    for side, (_, weight, _) in sides.items():
        rows = max(1, choice.rows * choice.block // head.padded(heads[side]))
        told, programs[side] = _side(placed[side][0], replace(choice, rows=rows))
        told |= {"HEADS": heads[side], "BLOCK_HEADS": power_of_two(heads[side])}
        arguments |= placed[side][1]
        arguments |= {_prefixed(side, name): value for name, value in told.items()}
        arguments[f"{side}_weight_ptr"] = dense_vector(weight)
    for name, table in zip(("cos", "sin"), tables[larger], strict=True):
        arguments[f"{name}_ptr"] = aligned_base(table)[0]
        for side in sides:
            del arguments[f"{side}_{name}_ptr"]
    arguments["q_programs"] = programs["q"]
    grid = (sum(programs.values()),)
    device = sides["q"][0].device
    return Launch(qk_norm_rope_kernel, grid, arguments, choice.num_warps, device)


def choose_tile(
    geometry: RowGeometry, head: HeadParts, heads: int, itemsize: int, lanes: int
) -> TileChoice:
    """The tile of the norms, with enough rows that each part of a head is loaded 16 bytes wide."""
    padded = head.padded(heads)
    by_rows = geometry.placements[0].unit == UNIT_ROW
    choice = choose(geometry.num_rows, padded, itemsize, by_rows=by_rows, lanes=lanes)
    threads = choice.num_warps * lanes
    wide = -(-VECTOR * threads // head.narrowest(heads))
    most = max(1, MOST_A_THREAD * threads // power_of_two(padded))
    return TileChoice(max(choice.rows, min(power_of_two(wide), most)), padded, choice.num_warps)


def _side(geometry: RowGeometry, choice: TileChoice) -> tuple[dict[str, Any], int]:
    told = row_arguments(geometry, choice)
    del told["HIDDEN"], told["BLOCK"]
    return told, num_programs(geometry, choice)


def _prefixed(side: str, name: str) -> str:
    return f"{side.upper() if name.isupper() else side}_{name}"


def _check_rotation(name: str, x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> None:
    size, head = rotation.rotary_dim, rotation.head_size or x.shape[-1]
    if x.shape[-1] % head or not 0 < size <= head or size % 2:
        raise ValueError(
            f"rotary_dim {size}: want an even number of at most {head}, the size of a head, which "
            f"divides the rows of {name} {describe(x)}"
        )
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in FLOATS or table.dtype != cos.dtype or table.device != x.device:
            raise ValueError(
                f"{table_name} {describe(table)}: want float16, bfloat16 or float32, the dtype of "
                f"cos, on {x.device}"
            )
        if table.dim() == 0 or table.shape[-1] not in (size, size // 2):
            raise ValueError(f"{table_name} {describe(table)}: want {size} or {size // 2} columns")
        if not _broadcasts(table.shape[:-1], x.shape[:-1]) or table.shape[-1] != cos.shape[-1]:
            raise ValueError(
                f"{table_name} {describe(table)}: does not broadcast to {name} {describe(x)}"
            )


def _broadcasts(shape: torch.Size, rows: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(rows), strict=False)
    return len(shape) <= len(rows) and all(size in (1, row) for size, row in pairs)


def _check_overlap(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    check_qk_norm_overlap(q, k, q_weight, k_weight, q_out, k_out)
    for out_name, out in (("q_out", q_out), ("k_out", k_out)):
        for name, table in (("cos", cos), ("sin", sin)):
            same = table.numel() and out.data_ptr() == table.data_ptr()
            if same or overlap_partly(out, table):
                raise ValueError(f"{out_name} {describe(out)}: lies over {name} {describe(table)}")


OPERANDS = ("q", "k", "q_weight", "k_weight", "cos", "sin", "q_out", "k_out")
LAUNCHES = LaunchCache(qk_norm_rope_kernel, OPERANDS, _plan_launches, _check_overlap)

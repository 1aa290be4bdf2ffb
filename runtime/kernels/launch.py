"""Launches of the norm kernels: tile, warps and grid from layout, size and device.

The arguments include the dtype of each rounding step. They are checked before, in checks.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fixpass.runtime.kernels.row_geometry import (
    MAX_LEADING,
    UNIT_ROW,
    Operand,
    RowGeometry,
    aligned_base,
    lay_out,
    operand,
)
from fixpass.runtime.quantized_norm import APPLY, Quantization

VECTOR = 8  # elements a thread holds in one 16-byte register group of a 16-bit type
ENOUGH_PROGRAMS = 512  # above it every multiprocessor has work with two vectors a thread
BY_ROWS_BYTES = 32768
MAX_INT32_ROWS = 2**31 - 2**16  # below it row numbers, and the tile past the last, fit int32


TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

CODES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.int8: tl.int8,
}
HIP_FORMATS = {
    "gfx942": (torch.float8_e4m3fnuz,),
    "gfx950": (torch.float8_e4m3fn,),
}


@dataclass(frozen=True)
class TileChoice:
    """The tile that one program holds in registers, and the number of its warps."""

    rows: int
    block: int
    num_warps: int


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller than `size`."""
    return 1 << max(0, size - 1).bit_length()


def choose(
    num_rows: int, hidden_size: int, itemsize: int, *, by_rows: bool, lanes: int
) -> TileChoice:
    """The launch choice, from sizes, the width of an item, the unit stride and the warp's width.

    * A tile has at least one 16-byte vector a thread, so no element is held twice: a
      replicated element would be read by one warp after another wrote it in place.
    * Small hidden sizes: four warps, each row inside one warp (no shared memory up to 8
      elements a lane), two vectors a thread to overlap loads; one warp with one vector
      when rows are few, to spread them over more programs.
    * Large hidden sizes: one row a program, two vectors a thread, more past 16 warps of
      32 lanes.
    * Unit stride along rows (channels first): up to 32 rows, so that a column of the tile
      is whole sectors, as long as the tile is 32 KiB: more spills.
    """
    block = power_of_two(hidden_size)
    most_warps = 512 // lanes
    if by_rows:
        rows = max(1, min(32, BY_ROWS_BYTES // itemsize // block))
        rows = max(rows, 4 * lanes * VECTOR // block)
        warps = rows * block // (lanes * 2 * VECTOR)
        return TileChoice(rows, block, max(4, min(most_warps, warps)))
    rows = 4 * lanes * 2 * VECTOR // block
    if rows >= 1 and num_rows <= rows * ENOUGH_PROGRAMS and block <= lanes * VECTOR:
        return TileChoice(lanes * VECTOR // block, block, 1)
    if rows >= 1:
        return TileChoice(rows, block, 4)
    warps = block // (lanes * 2 * VECTOR)
    return TileChoice(1, block, min(most_warps, warps))


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, to be run or compiled for another device."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    device: torch.device

    def run(self) -> None:
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)
            return
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)


def place(**tensors: Tensor) -> tuple[RowGeometry, dict[str, Any]]:
    """Joint geometry of row operands, and the arguments that pass it to a kernel.

    For an operand `x`: `x_ptr` (aligned), the run-time `x_start`, `x_column` and, innermost
    first, `x_stride0` and so on, and the constant `X_UNIT`.
    """
    bases = {name: aligned_base(tensor) for name, tensor in tensors.items()}
    operands = tuple(operand(tensor, bases[name][1]) for name, tensor in tensors.items())
    geometry, integers = _told(tuple(tensors), operands)
    pointers = {f"{name}_ptr": base for name, (base, _) in bases.items()}
    return geometry, {**integers, **pointers}


@lru_cache(maxsize=4096)
def _told(
    names: tuple[str, ...], operands: tuple[Operand, ...]
) -> tuple[RowGeometry, dict[str, int]]:
    geometry = lay_out(operands)
    integers: dict[str, int] = {}
    for name, placement in zip(names, geometry.placements, strict=True):
        values = (placement.start, placement.column, *_padded(placement.strides, MAX_LEADING))
        integers |= zip(placement_names(name), values, strict=True)
        integers[f"{name.upper()}_UNIT"] = placement.unit
    return geometry, integers


def placement_names(name: str) -> tuple[str, ...]:
    strides = (f"{name}_stride{i}" for i in range(MAX_LEADING))
    return (f"{name}_start", f"{name}_column", *strides)


def run_time(*operands: str) -> list[str]:
    """The integer arguments of a norm kernel: no value of theirs may start a compilation.

    They are separate arguments: inside a tuple the JIT specializes on values regardless.
    """
    placed = [each for name in operands for each in placement_names(name)]
    return [*placed, "size0", "size1", "size2", "num_rows", "eps"]


def _padded(outermost_first: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The same values innermost first, filled up with zeros."""
    return (*reversed(outermost_first), *(0,) * (length - len(outermost_first)))


def parts(**tensors: Tensor) -> Iterator[dict[str, Tensor]]:
    """The tensors, or slices of them if more than MAX_LEADING dimensions remain after merging."""
    names = tuple(tensors)
    geometry = lay_out(tuple(operand(tensor, 0) for tensor in tensors.values()))
    if len(geometry.sizes) <= MAX_LEADING:
        yield tensors
        return
    shape = tensors[names[0]].shape
    outer = next(i for i, size in enumerate(shape) if size > 1)
    for slices in zip(*(tensors[name].unbind(outer) for name in names), strict=True):
        yield from parts(**dict(zip(names, slices, strict=True)))


def row_arguments(geometry: RowGeometry, choice: TileChoice) -> dict[str, Any]:
    """The kernel's arguments for the rows; the outermost size is never needed."""
    inner = _padded(geometry.sizes[1:], MAX_LEADING - 1)
    return {
        **{f"size{i}": size for i, size in enumerate(inner)},
        "DIMS": len(geometry.sizes),
        "num_rows": geometry.num_rows // geometry.size_unit,
        "HIDDEN": geometry.hidden_size,
        "ROWS": choice.rows,
        "BLOCK": choice.block,
        "VECTOR": geometry.vector,
        "SIZE_UNIT": geometry.size_unit,
        "WIDE_ROWS": geometry.num_rows > MAX_INT32_ROWS,
    }


def choose_for(geometry: RowGeometry, itemsize: int, lanes: int) -> TileChoice:
    by_rows = geometry.placements[0].unit == UNIT_ROW
    sizes = geometry.num_rows, geometry.hidden_size
    return choose(*sizes, itemsize, by_rows=by_rows, lanes=lanes)


def num_programs(geometry: RowGeometry, choice: TileChoice) -> int:
    return -(-geometry.num_rows // choice.rows)


def lanes_of(device: torch.device) -> int:
    """Threads of a warp: 32 on NVIDIA and RDNA, 64 on CDNA; 32 where nothing is launched."""
    if device.type != "cuda":
        return 32
    return _cuda_lanes(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _cuda_lanes(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).warp_size)


@lru_cache
def native_formats(device: torch.device) -> tuple[torch.dtype, ...]:
    """The float8 dtypes that the device converts to in hardware; none where nothing is launched."""
    if device.type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(device)
    if not torch.version.hip:
        is_new = (properties.major, properties.minor) >= (8, 9)
        return (torch.float8_e4m3fn,) if is_new else ()
    return HIP_FORMATS.get(properties.gcnArchName.partition(":")[0], ())


def dense_vector(tensor: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels read it; a strided one is copied, hidden-size elements."""
    if tensor is None or tensor.stride(0) == 1 or tensor.shape[0] == 1:
        return tensor
    return tensor.contiguous()


def plan_rows(
    kernel: Any,
    rows: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    constants: dict[str, object],
    *,
    lanes: int,
) -> Launch:
    """The launch of a kernel over operands of one shape; the tile is chosen for x."""
    geometry, placed = place(**rows)
    choice = choose_for(geometry, rows["x"].element_size(), lanes)
    arguments = {
        **placed,
        "weight_ptr": dense_vector(weight),
        "bias_ptr": dense_vector(bias),
        "eps": eps,
        **row_arguments(geometry, choice),
        **constants,
    }
    grid = (num_programs(geometry, choice),)
    return Launch(kernel, grid, arguments, choice.num_warps, rows["x"].device)


def rounding(
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The constants of the weight rule in tile.weigh: the dtype that each step rounds to.

    The dtypes are those that torch's promotion gives the op's reference, step by step.
    """
    normed = norm_dtype or torch.float32
    weighed, product = normed, normed
    if weight is not None:
        weighed = weight_dtype or weight.dtype
        product = torch.promote_types(normed, weighed)
    summed = product if bias is None else torch.promote_types(product, bias.dtype)
    return {
        "NORM": TRITON_DTYPES[normed],
        "WEIGHT": TRITON_DTYPES[weighed],
        "OFFSET": float(weight_offset),
        "PRODUCT": TRITON_DTYPES[product],
        "SUM": TRITON_DTYPES[summed],
    }


def quantization_constants(
    steps: Quantization,
    normed: torch.dtype,
    native: tuple[torch.dtype, ...],
) -> dict[str, Any]:
    """The constants of quantize_tile.py; native: the dtypes that the device converts to."""
    return {
        "NORMED": TRITON_DTYPES[normed],
        "GROUP": steps.group_size,
        "LIMIT": steps.limit,
        "AMAX_MIN": steps.amax_min,
        "SCALE_MIN": steps.scale_min,
        "SCALE": TRITON_DTYPES[steps.scale_dtype or torch.float32],
        "APPLY": APPLY.index(steps.apply),
        "LOW": steps.low,
        "HIGH": steps.high,
        "CODE": CODES[steps.quant_dtype],
        "IS_NATIVE": steps.quant_dtype in native,
    }

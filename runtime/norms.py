"""The meaning of the norm ops, written in PyTorch: rounding steps, weight, bias, output layout.

These functions are the truth. Kernels are compared with them, Inductor compiles them, and the
op bodies in `fixpass.runtime.ops` call them. They choose no kernel and read no layout.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Own = TypeVar("Own", bound="DataclassInstance")


@dataclass(frozen=True)
class Affine:
    """What follows the normalisation: each rounding step, the weight, the bias, the layout.

    Shapes: `weight` and `bias` are (hidden_size,) or None. A dtype of None means that the step
    is left out and PyTorch's type promotion decides. `order` lists the dimensions of the dense
    output, outermost first; None means contiguous.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_offset: float = 0.0
    compute_dtype: torch.dtype | None = None
    norm_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    order: list[int] | None = None


def split_steps(kind: type[Own], steps: dict[str, Any]) -> tuple[Own, dict[str, Any]]:
    """The keyword arguments of an op: the fields of `kind`, and the norm's own."""
    names = kind.__dataclass_fields__
    own = kind(**{name: steps[name] for name in names if name in steps})
    return own, {name: step for name, step in steps.items() if name not in names}


def rms_norm(x: Tensor, eps: float, affine: Affine) -> Tensor:
    """Root-mean-square norm over the last dimension of x (..., hidden_size)."""
    return with_order(rms_norm_values(x, eps, affine), affine.order)


def rms_norm_values(x: Tensor, eps: float, affine: Affine) -> Tensor:
    """The values of `rms_norm`, for one more step: laid out as PyTorch lays them out."""
    h = x.to(affine.compute_dtype or default_compute_dtype(x.dtype))
    return _finish(x, h, eps, affine)


def layer_norm(x: Tensor, eps: float, affine: Affine) -> Tensor:
    """Layer norm over the last dimension of x (..., hidden_size), with the biased variance."""
    h = x.to(affine.compute_dtype or default_compute_dtype(x.dtype))
    h = h - h.mean(-1, keepdim=True)
    return with_order(_finish(x, h, eps, affine), affine.order)


def default_compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_order(y: Tensor, order: list[int] | None) -> Tensor:
    """Y in dense storage whose dimensions are laid out in `order`, outermost first."""
    if order is None:
        return _dense(y)
    inverse = [order.index(dim) for dim in range(y.dim())]
    return _dense(y.permute(order)).permute(inverse)


def _dense(y: Tensor) -> Tensor:
    # `y.contiguous()` asks for the device, which need not be here while a graph is traced for it.
    return y if y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)


def _finish(x: Tensor, h: Tensor, eps: float, affine: Affine) -> Tensor:
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if affine.norm_dtype is not None:
        y = y.to(affine.norm_dtype)
    if affine.weight is not None:
        weight = affine.weight
        if affine.weight_dtype is not None:
            weight = weight.to(affine.weight_dtype)
        if affine.weight_offset != 0.0:
            weight = weight + affine.weight_offset
        y = y * weight
    if affine.bias is not None:
        y = y + affine.bias
    return y.to(affine.out_dtype or x.dtype)

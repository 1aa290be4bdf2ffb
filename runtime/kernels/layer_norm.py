"""Layer norm of any layout, on the kernel of rms_norm.py with the mean taken away.

The variance is the mean of squares of the centered values, held in registers: x is read
once. It keeps no statistics for a backward pass.
"""

import torch
from torch import Tensor

from fixpass.runtime.kernels.checks import check_layer_norm
from fixpass.runtime.kernels.launch import lanes_of, parts
from fixpass.runtime.kernels.rms_norm import plan_norm
from fixpass.runtime.kernels.rounding import rounding


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Write the layer norm of `x` over its last dimension into `out`, both of any strides."""
    check_layer_norm(
        x, weight, eps, out=out, bias=bias, norm_dtype=norm_dtype, weight_dtype=weight_dtype
    )
    if x.numel() == 0:
        return
    rule = rounding(weight, bias, weight_offset, norm_dtype, weight_dtype)
    for rows in parts(x=x, out=out):
        plan_norm(rows, weight, bias, eps, rule, center=True, lanes=lanes_of(x.device)).run()

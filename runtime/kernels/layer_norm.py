"""Layer norm of any layout, on the kernel of rms_norm.py with the mean taken away.

The variance is the mean of squares of the centered values, held in registers: x is read
once. It keeps no statistics for a backward pass.
"""

from functools import partial

import torch
from torch import Tensor

from fixpass.runtime.kernels.checks import check_norm_overlap
from fixpass.runtime.kernels.launch_cache import LaunchCache
from fixpass.runtime.kernels.rms_norm import OPERANDS, norm_kernel, plan_launches

LAUNCHES = LaunchCache(
    norm_kernel, OPERANDS, partial(plan_launches, center=True), check_norm_overlap
)


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
    outputs_are_new: bool = False,
) -> None:
    """Write the layer norm of `x` over its last dimension into `out`, both of any strides."""
    options = (eps, weight_offset, norm_dtype, weight_dtype)
    LAUNCHES.run((x, weight, bias, out), options, outputs_are_new)

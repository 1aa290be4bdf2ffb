"""Which type each step of a norm rounds to, as constants of a kernel.

The types are those that torch's promotion gives the op's reference, step by step. No
values, no layouts.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def triton_dtype(dtype: torch.dtype) -> Any:
    return _TRITON[dtype]


def rounding(
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """NORM, WEIGHT, OFFSET, PRODUCT and SUM of the weight rule in tile.weigh."""
    normed = norm_dtype or torch.float32
    weighed, product = normed, normed
    if weight is not None:
        weighed = weight_dtype or weight.dtype
        product = torch.promote_types(normed, weighed)
    summed = product if bias is None else torch.promote_types(product, bias.dtype)
    return {
        "NORM": triton_dtype(normed),
        "WEIGHT": triton_dtype(weighed),
        "OFFSET": float(weight_offset),
        "PRODUCT": triton_dtype(product),
        "SUM": triton_dtype(summed),
    }

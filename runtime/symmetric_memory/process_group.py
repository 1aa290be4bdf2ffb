"""All-reduce through the process group, where symmetric memory does not serve."""

import torch
from torch import Tensor

SUMMED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that are summed in symmetric memory, each accumulated in float32."""


def process_group_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """x reduced over the ranks of the process group: a new dense tensor."""
    functional = torch.ops._c10d_functional
    pending = functional.all_reduce(x.contiguous(), reduce_op, group_name)
    return functional.wait_tensor(pending)  # type: ignore[no-any-return]

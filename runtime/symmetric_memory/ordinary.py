"""All-reduce through the process group, as if fixpass were not there; and what we sum instead."""

import torch
from torch import Tensor

# Dtypes that are summed in symmetric memory, in float32 whatever they are.
SUMMED = (torch.float32, torch.bfloat16, torch.float16)


def ordinary_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """x reduced over the ranks of the process group: a new dense tensor."""
    functional = torch.ops._c10d_functional
    pending = functional.all_reduce(x.contiguous(), reduce_op, group_name)
    return functional.wait_tensor(pending)  # type: ignore[no-any-return]

"""PyTorch's own `torch.ops.symm_mem` all-reduces on CPU tensors, which it has no kernels for.

The tensors may lie anywhere. A torch that brings kernels for CPU keeps its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


def serve_on_cpu(all_reduce_op: Callable[..., Tensor], in_place: Callable[..., Tensor]) -> Library:
    """Register the ops; they live as long as the library that is returned."""

    def one_shot(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
        return all_reduce_op(x, reduce_op, group_name)

    def into(x: Tensor, reduce_op: str, group_name: str, out: Tensor) -> Tensor:
        return out.copy_(all_reduce_op(x, reduce_op, group_name))

    kernels: dict[str, Callable[..., Any]] = {
        "one_shot_all_reduce": one_shot,
        "one_shot_all_reduce_out": into,
        "two_shot_all_reduce_": in_place,
        "two_shot_all_reduce_out": into,
    }
    library = Library("symm_mem", "IMPL")
    for name, kernel in kernels.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", "CPU"):
            library.impl(name, kernel, "CPU")
    return library

"""Random tensors for tests, named after their dtype: `bf16(5, 3072)`."""

import torch
from torch import Tensor


def bf16(*shape: int) -> Tensor:
    """A bfloat16 tensor of standard normal values."""
    return torch.randn(shape).to(torch.bfloat16)


def f16(*shape: int) -> Tensor:
    """A float16 tensor of standard normal values."""
    return torch.randn(shape).to(torch.float16)


def f32(*shape: int) -> Tensor:
    """A float32 tensor of standard normal values."""
    return torch.randn(shape)

"""Helpers for tests of folded weights: parameters of every dtype, and layouts written out."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameter(*shape, dtype=torch.bfloat16, seed=0):
    """A parameter of random bits, among them NaN: what is moved must be moved bit for bit."""
    random = torch.Generator().manual_seed(seed)
    raw = torch.randint(
        0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=random, dtype=torch.uint8
    )
    return nn.Parameter(raw.view(dtype), requires_grad=dtype.is_floating_point)


def bits(tensor):
    return tensor.detach().contiguous().view(BITS[tensor.element_size()])


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def aiter(weight, k_bytes=16):
    """aiter's shuffle of (..., N, K), written as aiter documents it."""
    k = k_bytes // weight.element_size()
    n, width = weight.shape[-2:]
    cells = bits(weight).view(-1, n // 16, 16, width // (2 * k), 2, k)
    return cells.permute(0, 1, 3, 4, 2, 5).contiguous().view(weight.shape).view(weight.dtype)


def interleaved(weight):
    gate, up = bits(weight).chunk(2, -2)
    return torch.stack([gate, up], -2).view(weight.shape).view(weight.dtype)


REFERENCES = {
    "aiter_16x16": aiter,
    "aiter_16x16_int4": lambda weight: aiter(weight, 32),
    "transposed": lambda weight: weight.mT,
    "transposed_dense": lambda weight: weight.mT,
    "column_major": lambda weight: weight,
    "up_gate": lambda weight: torch.cat(weight.chunk(2, -2)[::-1], -2),
    "gate_up_interleaved": interleaved,
    "gate_up_interleaved_16x16": lambda weight: aiter(interleaved(weight)),
}


class Allocations(TorchDispatchMode):
    """The largest new tensor, and what was alive at most if nothing was freed, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result

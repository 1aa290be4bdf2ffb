"""The ops `fixpass::skinny_linear` and `skinny_linears`: few rows of x by plain weights, on CPU.

A decode step reads each weight once, so memory bounds it. The C++ kernel reads the weight as it is
stored, at the speed of memory: nothing is packed, no second copy exists, and an update of the
weight is read by the next call. PyTorch computes calls of more than MOST_ROWS rows, all other calls
that the kernel does not take, and gradients.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import extension, ops

MOST_ROWS = 16
"""The kernel computes x of so many rows; PyTorch computes more."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str:
    """Why this process has no C++ kernel; empty where it has one. The first call builds it."""
    return extension.load("skinny_linear", uses_torch=True).reason


@cache
def direct_call() -> Callable[..., Any]:
    """Return what generated code calls: `skinny_linear.out` without the dispatcher."""
    library = extension.load("skinny_linear", uses_torch=True).library
    op: Callable[..., Any] = torch.ops.fixpass.skinny_linear.out
    if library is None:
        return op
    try:
        function = ctypes.PYFUNCTYPE(ctypes.py_object)(("skinny_linear_function", library))
    # It was built without Python's headers.
    except AttributeError:
        return op
    found: Callable[..., Any] = function()
    return found


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (M, K) @ weight (K, N) + bias (N), in one pass over the weight for few rows.

    Args:
        x: 2-D, of any strides.
        weight: As `torch.mm` takes it. The kernel reads it where its rows or its columns have
            elements side by side, with any distance between them.
        bias: A vector, or None.

    """
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _run_one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A graph from a cache calls the op in a process that has not asked for the kernel yet.
    if x.device.type == "cpu" and not unavailable():
        result: Tensor = torch.ops.fixpass.skinny_linear(x, weight, bias)
        return result
    return skinny_linear(x, weight, bias)


def _run_into(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    if x.device.type == "cpu" and not unavailable():
        result: Tensor = torch.ops.fixpass.skinny_linear.out(x, weight, bias, out=out)
        return result
    torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
    return out


def _run_all(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_run_one(x, *layer) for layer in zip(weights, biases, strict=True)]


def _run_experts(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.device.type == "cpu" and not unavailable():
        result: Tensor = torch.ops.fixpass.skinny_experts(x, weight, ends)
        return result
    starts = [0, *ends.tolist()]
    parts = [
        x[start:end] @ each for start, end, each in zip(starts, starts[1:], weight, strict=False)
    ]
    return torch.cat([*parts, x.new_zeros((x.shape[0] - starts[-1], weight.shape[2]))])


def _fake_one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _fake_experts(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _fake_all(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_fake_one(x, weight, None) for weight in weights]


_ONE = "skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
# With the tag `out` Inductor would lower the op itself, which fails in torch 2.13 where a size is a
# symbol.
_INTO = "skinny_linear.out(Tensor x, Tensor weight, Tensor? bias, *, Tensor(a!) out) -> Tensor(a!)"
_EXPERTS = "skinny_experts(Tensor x, Tensor weight, Tensor ends) -> Tensor"
_ALL = "skinny_linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]"


def _define(
    library: torch.library.Library, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    name = schema.partition("(")[0]
    # The ops take any layout: Inductor copies nothing for them.
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    library.impl(name, run, "CompositeExplicitAutograd")
    # PyTorch's own ops record the gradient, here and in the C++.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fixpass::{name}", fake, lib=library)


_define(ops.DEFINITIONS, _ONE, _run_one, _fake_one)
_define(ops.DEFINITIONS, _INTO, _run_into, lambda *_, out: out)
_define(ops.DEFINITIONS, _EXPERTS, _run_experts, _fake_experts)
_define(ops.DEFINITIONS, _ALL, _run_all, _fake_all)

"""The callables behind kernel names: the search for one, and calls of other libraries' ops.

The kernel table registers its rows here, so that an op finds its kernel by the name in its
argument `kernel_name`. The functions at the end each call one op of another library. They
allocate the tensors that it writes and pass everything else on; they check no layout and copy no
input for its layout, because `insert-relayout` has made the kernel's contract hold.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fixpass.runtime import norms, strided
from fixpass.runtime.errors import KernelError

Steps = dict[str, Any]

TABLE = "fixpass.lowering.contract_table"
"""The module that registers our kernels. A process that runs cached code may not have loaded it."""
TRITON = "Triton with a CUDA or ROCm device"
"""The requirement of our own kernels."""


class Provider(Protocol):
    """The part of a kernel's literal that a call needs."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def callable(self) -> str | Callable[..., Any]: ...
    @property
    def needs(self) -> str: ...


_providers: dict[tuple[str, str], list[Provider]] = {}
_checks: list[Callable[[str, str, tuple[Any, ...], Steps], None]] = []
_schemas: ContextVar[dict[str, Any] | None] = ContextVar("fixpass_schemas", default=None)


def register(providers: Iterable[Provider]) -> None:
    """Let the ops find these kernels by their names."""
    for provider in providers:
        _providers.setdefault((provider.op, provider.name), []).append(provider)


def call(op: str, kernel: str, args: tuple[Any, ...], steps: Steps) -> Any:
    """Run `kernel` for `fixpass::op`.

    Raises:
        KernelError: the kernel is unknown, or its library is not loaded.

    """
    for check in _checks:
        check(op, kernel, args, steps)
    return _resolve(op, kernel)(*args, **steps)


def check_calls(check: Callable[[str, str, tuple[Any, ...], Steps], None]) -> None:
    """Call `check` before each call of a kernel from now on (option `verify`)."""
    if check not in _checks:
        _checks.append(check)


@cache
def _resolve(op: str, kernel: str) -> Callable[..., Any]:
    """The callable of a kernel, searched once: a call must not pay for the search."""
    importlib.import_module(TABLE)
    found = _providers.get((op, kernel))
    if found is None:
        known = ", ".join(sorted({name for _, name in _providers}))
        raise KernelError(f"fixpass::{op}: unknown kernel {kernel!r}; known kernels: {known}")
    provider = next((provider for provider in found if meets(provider.needs)), None)
    if provider is None:
        raise KernelError(
            f"fixpass::{op}: kernel {kernel!r} needs {describe_needs(found[-1].needs)}, or leave "
            'the kernel out of options={"norm_kernels": ...}'
        )
    return load(provider.callable)


def load(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that "module:function" names. A function is returned as it is."""
    if not isinstance(name, str):
        return name
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def meets(needs: str) -> bool:
    """Whether this process has what a kernel needs: see `Kernel.needs`."""
    if needs == TRITON:
        return strided.is_available()
    if "::" not in needs:
        return not needs or find_spec(needs) is not None
    op, _, argument = needs.removesuffix(")").partition("(")
    schemas = _schemas_of(op)
    return bool(schemas) and (not argument or argument in (a.name for a in schemas[0].arguments))


def describe_needs(needs: str) -> str:
    """What to do so that `meets(needs)`, as the end of "it needs ..."."""
    if needs == TRITON:
        return needs
    if "::" not in needs:
        return f"the package {needs}: install it"
    return f"the op {needs}: import the library that brings it"


@contextmanager
def asked_once() -> Iterator[None]:
    """Within this context each op is looked up at most once: no library loads during a compile."""
    if _schemas.get() is not None:
        yield
        return
    token = _schemas.set({})
    try:
        yield
    finally:
        _schemas.reset(token)


def _schemas_of(name: str) -> Any:
    """The schemas of `namespace::op` that are registered in this process."""
    found = _schemas.get()
    if found is None:
        return torch._C._jit_get_schemas_for_operator(name)
    if name not in found:
        found[name] = torch._C._jit_get_schemas_for_operator(name)
    return found[name]


def op_exists(name: str) -> bool:
    """Whether `namespace::op` is registered in this process."""
    return bool(_schemas_of(name))


def overload_of(name: str) -> torch._ops.OpOverload:
    """The op `namespace::op`, or an overload of it as `namespace::op.overload`."""
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    found: torch._ops.OpOverload
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")
    return found


def _aiter_rounding(steps: Steps) -> dict[str, int]:
    """aiter's flag: 1 rounds before the weight is applied, 0 after.

    By keyword: a newer aiter has another flag, `gemma_norm`, in the same position.
    """
    return {"use_model_sensitive_rmsnorm": int(steps.get("norm_dtype") is not None)}


def aiter_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **steps: Any) -> Tensor:
    result: Tensor = torch.ops.aiter.rms_norm(x, weight, eps, **_aiter_rounding(steps))
    return result


def aiter_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any) -> Tensor:
    result: Tensor = torch.ops.aiter.layernorm2d_fwd(x, weight, bias, eps)
    return result


def aiter_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, _: None, eps: float, **steps: Any
) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    torch.ops.aiter.rmsnorm2d_fwd_with_add(
        out, x, residual, total, weight, eps, **_aiter_rounding(steps)
    )
    return out, total


def vllm_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **__: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out, x, weight, eps)
    return out


def vllm_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, _: None, eps: float, **__: Any
) -> tuple[Tensor, Tensor]:
    out = x.clone(memory_format=torch.contiguous_format)
    total = residual.clone(memory_format=torch.contiguous_format)
    torch.ops._C.fused_add_rms_norm(out, total, weight, eps)
    return out, total


def _exceeds_32_bits(*tensors: Tensor) -> bool:
    """Whether an element lies 2^32 elements or more behind the first: flashinfer wraps around."""
    ends = (zip(x.shape, x.stride(), strict=True) for x in tensors)
    return any(sum((size - 1) * stride for size, stride in end) >= 2**32 for end in ends)


def flashinfer_rms_norm(x: Tensor, weight: Tensor, _: None, eps: float, **steps: Any) -> Tensor:
    # The result is dense, so it may reach further than rows that overlap.
    if _exceeds_32_bits(x) or x.numel() > 2**32:
        return norms.rms_norm(x, eps, norms.Affine(weight, **steps))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gemma = steps.get("weight_offset") == 1.0
    op = torch.ops.flashinfer.gemma_rmsnorm if gemma else torch.ops.flashinfer.rmsnorm
    op(out, x, weight, eps, False)
    return out


def flashinfer_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, _: None, eps: float, **steps: Any
) -> tuple[Tensor, Tensor]:
    if _exceeds_32_bits(x, residual) or x.numel() > 2**32:
        summed = x + residual
        return norms.rms_norm(summed, eps, norms.Affine(weight, **steps)), summed.contiguous()
    out = x.clone(memory_format=torch.contiguous_format)
    total = residual.clone(memory_format=torch.contiguous_format)
    library, gemma = torch.ops.flashinfer, steps.get("weight_offset") == 1.0
    op = library.gemma_fused_add_rmsnorm if gemma else library.fused_add_rmsnorm
    op(out, total, weight, eps, False)
    return out, total

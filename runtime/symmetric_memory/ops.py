"""The ops that compiled code calls: `fixpass::all_reduce`, and a matmul or a call followed by one.

Without symmetric memory each does what the ordinary collective would have done, so a graph that
was compiled on one machine is right on any other. Outputs are dense. On CPU the C++ part takes the
first two over; what is here then serves other devices and machines without a compiler.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fixpass.runtime.ops import DEFINITIONS, TAGS
from fixpass.runtime.symmetric_memory import device, groups

SCHEMAS = {
    "all_reduce": "(Tensor input, str reduce_op, str group_name) -> Tensor",
    "matmul_all_reduce": (
        "(Tensor a, Tensor b, Tensor? bias, Scalar beta, Scalar alpha, str reduce_op, "
        "str group_name) -> Tensor"
    ),
    "call_all_reduce": (
        "(str op, Tensor[] tensors, str arguments, str reduce_op, str group_name) -> Tensor"
    ),
}


def all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """x reduced over the ranks of the group: a new dense tensor of the same shape and dtype."""
    if groups.is_ready(group_name):
        plain = groups.outcome_of(group_name).plain
        total = plain.all_reduce(x, reduce_op) if plain is not None else None
        if total is not None:
            return total
    return ordinary_all_reduce(x, reduce_op, group_name)


def ordinary_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """The same through the process group."""
    functional = torch.ops._c10d_functional
    pending = functional.all_reduce(x.contiguous(), reduce_op, group_name)
    return functional.wait_tensor(pending)  # type: ignore[no-any-return]


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None, beta: float, alpha: float
) -> Tensor:
    """a @ b, for 2-D or 3-D operands, and beta * bias + alpha * (a @ b) with a bias."""
    if bias is None:
        return a @ b
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    return add(bias, a, b, beta=beta, alpha=alpha)


def matmul_all_reduce(
    a: Tensor, b: Tensor, bias: Tensor | None, beta: float, alpha: float, *how: str
) -> Tensor:
    """matmul(a, b, bias, beta, alpha) reduced over the ranks of the group."""
    return torch.ops.fixpass.all_reduce(matmul(a, b, bias, beta, alpha), *how)  # type: ignore[no-any-return]


def call_all_reduce(
    op: str, tensors: Sequence[Tensor], arguments: str, reduce_op: str, group_name: str
) -> Tensor:
    """The result of an op, made in the group's memory, reduced over the ranks of the group.

    op: its full name with the overload. arguments: see `packed_call`.
    """
    run, args, kwargs = _unpacked(op, arguments)
    with allocating_in(group_name, tensors[0].device.type):
        product = run(*_filled(args, tensors), **_filled(kwargs, tensors))
    return torch.ops.fixpass.all_reduce(product, reduce_op, group_name)  # type: ignore[no-any-return]


def packed_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], str] | None:
    """The tensors of a call, and the rest of it as text; None where it cannot be written down.

    `is_tensor` is decided by type: whatever JSON cannot hold counts as a tensor, or is refused.
    """
    tensors: list[Any] = []

    def packed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [packed(each) for each in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if not isinstance(value, (torch.fx.Node, Tensor)):
            raise TypeError(type(value))
        tensors.append(value)
        return {"tensor": len(tensors) - 1}

    try:
        spec = json.dumps([packed(args), {k: packed(v) for k, v in kwargs.items()}])
    except TypeError:
        return None
    return tensors, spec


@lru_cache(maxsize=1024)
def _unpacked(op: str, arguments: str) -> tuple[Any, list[Any], dict[str, Any]]:
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    run = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    args, kwargs = json.loads(arguments)
    return run, args, kwargs


def _filled(spec: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(spec, list):
        return [_filled(each, tensors) for each in spec]
    if isinstance(spec, dict) and spec.keys() == {"tensor"}:
        return tensors[spec["tensor"]]
    if isinstance(spec, dict) and spec.keys() == {"dtype"}:
        return getattr(torch, spec["dtype"])
    if isinstance(spec, dict):
        return {key: _filled(value, tensors) for key, value in spec.items()}
    return spec


@contextmanager
def allocating_in(group_name: str, device_type: str = "cpu") -> Iterator[None]:
    """Within it, new tensors of this thread lie in the group's memory, where it has room.

    Without symmetric memory, and inside another such context, it does nothing.
    """
    if device_type != "cpu":
        with device.allocating_in(group_name):
            yield
        return
    native = groups.is_ready(group_name) and groups.outcome_of(group_name).plain is None
    if not native or not torch.ops.fixpass_symmetric_memory.set_allocating(group_name):
        yield
        return
    try:
        yield
    finally:
        torch.ops.fixpass_symmetric_memory.set_allocating("")


def _fake_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_matmul(a: Tensor, b: Tensor, bias: Any, beta: Any, alpha: Any, *how: str) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _fake_call(
    op: str, tensors: Sequence[Tensor], arguments: str, reduce_op: str, group_name: str
) -> Tensor:
    run, args, kwargs = _unpacked(op, arguments)
    product = run(*_filled(args, tensors), **_filled(kwargs, tensors))
    return torch.empty_like(product, memory_format=torch.contiguous_format)


def _define(library: Library) -> None:
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=TAGS)
    library.impl("all_reduce", all_reduce, "CompositeExplicitAutograd")
    library.impl("matmul_all_reduce", matmul_all_reduce, "CompositeExplicitAutograd")
    library.impl("call_all_reduce", call_all_reduce, "CompositeExplicitAutograd")
    library.impl("all_reduce", device.all_reduce, "CUDA")
    fakes = (("all_reduce", _fake_all_reduce), ("matmul_all_reduce", _fake_matmul))
    for name, fake in (*fakes, ("call_all_reduce", _fake_call)):
        torch.library.register_fake(f"fixpass::{name}", fake, lib=library)
    # Asked by the C++ part where it meets a group for the first time.
    library.define("prepare_group(str group_name) -> bool")
    library.impl("prepare_group", groups.is_ready, "CompositeImplicitAutograd")


_define(DEFINITIONS)

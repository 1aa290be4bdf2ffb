"""The ops that compiled code calls: `fixpass::all_reduce`, and a matmul or a call followed by one.

Outputs are dense. On CPU, kernels in C++ take the place of those here once a group has memory.
Without symmetric memory each op reduces through the process group, so a graph that was compiled on
one machine is right on any other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fixpass.runtime.ops import DEFINITIONS, TAGS
from fixpass.runtime.symmetric_memory import device, groups
from fixpass.runtime.symmetric_memory.op_call_codec import decode_call
from fixpass.runtime.symmetric_memory.process_group import process_group_all_reduce

# A captured CUDA graph would replay accesses to other ranks' memory without their knowledge.
OURS = (*TAGS, torch.Tag.cudagraph_unsafe)
SCHEMAS = {
    "all_reduce": "(Tensor input, str reduce_op, str group_name) -> Tensor",
    "all_reduce_": "(Tensor(a!) x, str reduce_op, str group_name) -> Tensor(a!)",
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
    if x.device.type == "cpu" and groups.is_ready(group_name):
        # This call has just loaded the C++, which has registered a kernel in place of this one.
        return torch.ops.fixpass.all_reduce(x, reduce_op, group_name)  # type: ignore[no-any-return]
    return process_group_all_reduce(x, reduce_op, group_name)


def all_reduce_(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """The same in place, for code that is not compiled."""
    return x.copy_(torch.ops.fixpass.all_reduce(x, reduce_op, group_name))


def matmul(a: Tensor, b: Tensor, bias: Tensor | None, beta: float, alpha: float) -> Tensor:
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

    op: its full name with the overload. arguments: see `op_call_codec.encode_call`.
    """
    run, args, kwargs = decode_call(op, arguments, tensors)
    with allocating_in(group_name, tensors[0].device.type):
        product = run(*args, **kwargs)
    return torch.ops.fixpass.all_reduce(product, reduce_op, group_name)  # type: ignore[no-any-return]


@contextmanager
def allocating_in(group_name: str, device_type: str = "cpu") -> Iterator[None]:
    """Within it, new tensors of this thread lie in the group's memory, where it has room.

    Without symmetric memory, and inside another such context, it does nothing.
    """
    if device_type != "cpu":
        with device.allocating_in(group_name):
            yield
        return
    if not groups.is_ready(group_name) or not _allocate_in(group_name):
        yield
        return
    try:
        yield
    finally:
        _allocate_in("")


def _allocate_in(group_name: str) -> bool:
    # The operator exists once a group is ready.
    return bool(torch.ops.fixpass_symmetric_memory.set_allocating(group_name))


def _fake_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_matmul(a: Tensor, b: Tensor, bias: Any, beta: Any, alpha: Any, *how: str) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _fake_call(
    op: str, tensors: Sequence[Tensor], arguments: str, reduce_op: str, group_name: str
) -> Tensor:
    run, args, kwargs = decode_call(op, arguments, tensors)
    product = run(*args, **kwargs)
    return torch.empty_like(product, memory_format=torch.contiguous_format)


def _define(library: Library) -> None:
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=OURS if "!" not in schema else ())
    library.impl("all_reduce", all_reduce, "CompositeExplicitAutograd")
    library.impl("all_reduce_", all_reduce_, "CompositeExplicitAutograd")
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

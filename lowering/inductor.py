"""How Inductor lowers our collectives and linear layers. Nothing is lowered at import.

What feeds an all-reduce is allocated symmetric. A linear layer writes into a buffer of Inductor's,
which takes less time in a call than a new tensor whose strides Inductor checks.

On CUDA and ROCm a producer of known size gets a buffer that Inductor allocates in symmetric memory
and keeps. Of unknown size, and on CPU, the op takes what it is given.
"""

import hashlib
import random
from functools import cache
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.comm_lowering import can_realize_as_comm_buffer, realize_as_comm_buffer
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V
from torch.distributed.distributed_c10d import GroupName
from torch.fx.experimental.symbolic_shapes import free_symbols

from fixpass.runtime.linear import direct_call

NAME = "fixpass_skinny_linear"


@cache
def register() -> None:
    """Tell Inductor about our collectives, once a process."""
    op = torch.ops.fixpass.all_reduce.default
    fallback = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def all_reduce(x: Any, reduce_op: str, group_name: str) -> Any:
        if x.get_device().type == "cuda" and not free_symbols(x.get_numel()):
            x = ir.ExternKernel.require_contiguous(x)
            if can_realize_as_comm_buffer(x, ir.CommBufferType.SYMM_MEM):
                realize_as_comm_buffer(x, ir.CommBufferType.SYMM_MEM, GroupName(group_name))
                _seed_allocation_ids()
        return fallback(x, reduce_op, group_name)


@cache
def register_linear() -> None:
    """Tell Inductor about `skinny_linear`, once a process.

    Generated code finds the function in Inductor's namespace of external kernels. The first call
    loads it, because code from a cache is lowered in no process.
    """

    def first_call(*args: Any, out: torch.Tensor) -> None:
        setattr(extern_kernels, NAME, direct_call())
        direct_call()(*args, out=out)

    setattr(extern_kernels, NAME, first_call)
    op = torch.ops.fixpass.skinny_linear.default
    fallback = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def skinny_linear(x: Any, weight: Any, bias: Any) -> Any:
        if V.graph.cpp_wrapper:
            return fallback(x, weight, bias)
        operands = [ir.ExternKernel.realize_input(each) for each in (x, weight, bias) if each]
        sizes = [x.get_size()[0], weight.get_size()[1]]
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(x.get_device(), x.get_dtype(), sizes),
            inputs=operands,
            constant_args=() if bias else (None,),
            python_kernel_name=f"extern_kernels.{NAME}",
            op_overload=torch.ops.fixpass.skinny_linear.out,
        )
        return ir.TensorBox.create(call)


def _seed_allocation_ids() -> None:
    """Keep two graphs from drawing one identity for two buffers.

    Inductor draws it at random, and Dynamo sets the state of the generator back after every graph.
    The seed is the graph's own text with its shapes and dtypes, so that one graph always compiles
    to the same code.
    """
    graph = V.graph.graph
    tensors = [node.meta.get("val") for node in graph.nodes]
    layouts = [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors]
    text = f"{V.graph.graph_id} {V.graph.name} {graph} {layouts}"
    random.seed(hashlib.sha256(text.encode()).digest())

"""How Inductor lowers linear layers of few rows: the kernel writes into a buffer of Inductor's.

This is faster than an op that returns a new tensor, whose strides Inductor's code would check.
Nothing is lowered at import.
"""

from functools import cache
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V

from fixpass.runtime.linear import direct_call

NAME = "fixpass_skinny_linear"


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
        operands = [
            ir.ExternKernel.realize_input(each) for each in (x, weight, bias) if each is not None
        ]
        sizes = [x.get_size()[0], weight.get_size()[1]]
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(x.get_device(), x.get_dtype(), sizes),
            inputs=operands,
            constant_args=() if bias is not None else (None,),
            python_kernel_name=f"extern_kernels.{NAME}",
            op_overload=torch.ops.fixpass.skinny_linear.out,
        )
        return ir.TensorBox.create(call)

"""QUANTIZING: the rows of the contract table for other libraries' norms with quantised output."""

import torch

from fixpass.lowering.constraints import (
    Absent,
    AlignedVector,
    Constraint,
    Dense2D,
    LastStridesDivisible,
    NotEmpty,
    Present,
    SameShape,
)
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.dtype_constraints import (
    ComputesIn,
    DtypeIn,
    OneNumber,
    QuantizedAs,
    SameDtype,
    WeightRule,
)
from fixpass.runtime.kernels.checks import FLOATS
from fixpass.runtime.quantized_norm import FP8

_SOURCE = "vLLM, csrc/layernorm_quant_kernels.cu and csrc/quantization/fused_kernels"
_ROWS: tuple[Constraint, ...] = (
    NotEmpty(),
    Dense2D("x"),
    Dense2D("out"),
    LastStridesDivisible("x", 16),
    DtypeIn("x", FLOATS),
    ComputesIn(torch.float32),
    Present("weight"),
    Absent("bias"),
    AlignedVector("weight"),
    # The weight is read as if it had the dtype of x, in older versions unchecked.
    SameDtype("weight"),
    WeightRule((True,)),
)
_STATIC = (
    *_ROWS,
    DtypeIn("out", FP8),
    Dense2D("residual"),
    SameShape("residual", "x"),
    SameDtype("residual"),
    Present("scale"),
    OneNumber("scale"),
    QuantizedAs("reciprocal", ()),
)
# The dynamic kernels compute the variance of an unrounded sum. The reference rounds the sum.
_DYNAMIC = (*_ROWS, Absent("residual"), Absent("scale"))


def _dynamic(name: str, op: str, *constraints: Constraint) -> Kernel:
    contract = Contract((*_DYNAMIC, *constraints), f"{_SOURCE}: the sum is not rounded")
    return Kernel(name, "rms_norm_quant", contract, "fixpass.runtime.vllm_quant:dynamic", op)


QUANTIZING: tuple[Kernel, ...] = (
    Kernel(
        "vllm_rms_norm_static_fp8",
        "rms_norm_quant",
        Contract(_STATIC, f"{_SOURCE}: stride(-2) with flattened rows"),
        "fixpass.runtime.vllm_quant:static",
        needs="_C::fused_add_rms_norm_static_fp8_quant",
        overwrites=("residual",),
    ),
    _dynamic(
        "vllm_rms_norm_dynamic_fp8",
        "_C::rms_norm_dynamic_per_token_quant",
        DtypeIn("out", FP8),
        QuantizedAs("divide"),
    ),
    _dynamic(
        "vllm_rms_norm_dynamic_int8",
        "_C::rms_norm_dynamic_per_token_quant",
        DtypeIn("out", (torch.int8,)),
        QuantizedAs("reciprocal"),
    ),
    _dynamic(
        "vllm_rms_norm_block_fp8",
        "_C::rms_norm_per_block_quant",
        DtypeIn("out", FP8),
        QuantizedAs("divide", (64, 128)),
    ),
)

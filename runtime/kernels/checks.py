"""Checks of a norm's operands before any launch: ValueError names the operand.

Plain Python on shapes, strides, dtypes and devices: no triton, no launch, no values.
"""

import torch
from torch import Tensor

from fixpass.runtime.gated_norm import ACTIVATIONS, Gating
from fixpass.runtime.kernels.row_geometry import describe, overlap_partly, overlaps_itself
from fixpass.runtime.quantized_norm import QUANTIZED, Quantization

MAX_HIDDEN = 32768  # one row in the registers of one program
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError where rms_norm or layer_norm can't compute the operands."""
    _check_rows("x", x)
    _check_parameter("weight", weight, x)
    _check_parameter("bias", bias, x)
    _check_type("norm_dtype", norm_dtype)
    _check_type("weight_dtype", weight_dtype)
    _check_output("out", out, x)


def check_norm_overlap(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """Raise ValueError where rms_norm or layer_norm would write over what it still reads."""
    _check_overlap("out", out, {"x": x, "weight": weight, "bias": bias})


def check_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sum_out: Tensor,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError where add_rms_norm can't compute the operands."""
    check_norm(x, weight, bias, out, norm_dtype, weight_dtype)
    _check_residual(residual, sum_out, x)


def check_add_norm_overlap(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sum_out: Tensor,
) -> None:
    """Raise ValueError where add_rms_norm would write over what it still reads."""
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    _check_overlap("sum_out", sum_out, inputs)
    _check_overlap("out", out, inputs)
    _check_apart("out", out, {"sum_out": sum_out})


def check_qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    *,
    head_size: int = 0,
) -> None:
    """Raise ValueError where qk_norm can't compute the operands.

    head_size: rows are norms of several heads, and may differ in size.
    """
    _check_rows("q", q)
    _check_rows("k", k)
    if k.device != q.device:
        raise ValueError(f"k {describe(k)} is on {k.device}, q on {q.device}")
    if (k.shape[-1] != q.shape[-1] and not head_size) or k.dtype != q.dtype:
        raise ValueError(f"k {describe(k)}: hidden size and dtype differ from q {describe(q)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight: both or neither")
    _check_parameter("q_weight", q_weight, q)
    _check_parameter("k_weight", k_weight, k)
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(f"k_weight {describe(k_weight)}: q_weight is {describe(q_weight)}")
    _check_type("norm_dtype", norm_dtype)
    _check_type("weight_dtype", weight_dtype)
    _check_output("q_out", q_out, q)
    _check_output("k_out", k_out, k)
    if q_out.dtype != k_out.dtype:
        raise ValueError(f"k_out {describe(k_out)}: q_out is {describe(q_out)}")


def check_qk_norm_overlap(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Raise ValueError where qk_norm would write over what it still reads."""
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    _check_overlap("q_out", q_out, {"q": q, **weights})
    _check_overlap("k_out", k_out, {"k": k, **weights})
    _check_apart("q_out", q_out, {"k": k})
    _check_apart("k_out", k_out, {"q": q, "q_out": q_out})


def check_norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    sum_out: Tensor | None,
    scales: Tensor | None,
    steps: Quantization,
) -> None:
    """Raise ValueError where rms_norm_quant can't compute the operands."""
    _check_rows("x", x)
    _check_parameter("weight", weight, x)
    _check_parameter("bias", bias, x)
    if (residual is None) != (sum_out is None):
        raise ValueError("residual and sum_out: both or neither")
    if residual is not None and sum_out is not None:
        _check_residual(residual, sum_out, x)
    if steps.quant_dtype not in QUANTIZED:
        raise ValueError(f"out: {steps.quant_dtype} is none of {QUANTIZED}")
    _check_like("out", out, x)
    _check_injective("out", out)
    if (scale is None) != (scales is not None):
        raise ValueError("scale and scales: one of them")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(f"scale {describe(scale)}: want one float32 number")
    group = steps.group_size
    if group and (group & (group - 1) or x.shape[-1] % group):
        raise ValueError(f"group_size {group}: want a power of two that divides {x.shape[-1]}")
    if scales is not None:
        wanted = (*x.shape[:-1], x.shape[-1] // group if group else 1)
        if scales.shape != wanted or scales.dtype != torch.float32:
            raise ValueError(f"scales {describe(scales)}: want float32 of {list(wanted)}")
        _check_injective("scales", scales)


def check_norm_quant_overlap(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    sum_out: Tensor | None,
    scales: Tensor | None,
) -> None:
    """Raise ValueError where rms_norm_quant would write over what it still reads."""
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias, "scale": scale}
    written = {"out": out, "sum_out": sum_out, "scales": scales}
    for name, tensor in written.items():
        if tensor is not None:
            _check_overlap(name, tensor, inputs)
            others = {n: t for n, t in written.items() if n != name and t is not None}
            _check_apart(name, tensor, others)


def check_gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    out: Tensor,
    gating: Gating,
    norm_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError where gated_rms_norm can't compute the operands."""
    check_norm(x, weight, None, out, norm_dtype, weight_dtype)
    _check_rows("gate", gate)
    _check_like("gate", gate, x)
    _check_type("gate_dtype", gating.gate_dtype)
    _check_type("normed_dtype", gating.normed_dtype)
    if gating.activation not in ACTIVATIONS:
        raise ValueError(f"activation {gating.activation!r} is none of {list(ACTIVATIONS)}")
    if gating.group_size and x.shape[-1] % gating.group_size:
        raise ValueError(f"group_size {gating.group_size} does not divide {x.shape[-1]}")


def check_gated_norm_overlap(x: Tensor, gate: Tensor, weight: Tensor | None, out: Tensor) -> None:
    """Raise ValueError where gated_rms_norm would write over what it still reads."""
    _check_overlap("out", out, {"x": x, "gate": gate, "weight": weight})


def check_rounding(*dtypes: torch.dtype | None) -> None:
    """Raise ValueError where a step rounds to a dtype that the kernels do not know."""
    for dtype in dtypes:
        _check_type("norm_dtype, weight_dtype and out_dtype:", dtype)


def _check_residual(residual: Tensor, sum_out: Tensor, x: Tensor) -> None:
    _check_rows("residual", residual)
    _check_like("residual", residual, x)
    _check_output("sum_out", sum_out, x)
    summed = torch.promote_types(x.dtype, residual.dtype)
    if sum_out.dtype != summed:
        raise ValueError(f"sum_out {describe(sum_out)}: x + residual is {summed}")


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} {describe(tensor)}: want float16, bfloat16 or float32")
    if tensor.dim() == 0:
        raise ValueError(f"{name} {describe(tensor)}: has no hidden dimension")
    if tensor.shape[-1] > MAX_HIDDEN:
        raise ValueError(
            f"{name} {describe(tensor)}: hidden size over {MAX_HIDDEN}, what one program holds"
        )


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape:
        raise ValueError(f"{name} {describe(tensor)}: shape differs from x {describe(x)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} {describe(tensor)} is on {tensor.device}, x on {x.device}")


def _check_parameter(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} {describe(tensor)}: want float16, bfloat16 or float32")
    if tensor.shape != x.shape[-1:]:
        raise ValueError(f"{name} {describe(tensor)}: want [{x.shape[-1]}] for x {describe(x)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} {describe(tensor)} is on {tensor.device}, x on {x.device}")


def _check_type(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"{name} {dtype}: want float16, bfloat16 or float32")


def _check_output(name: str, out: Tensor, x: Tensor) -> None:
    if out.dtype not in FLOATS:
        raise ValueError(f"{name} {describe(out)}: want float16, bfloat16 or float32")
    _check_like(name, out, x)
    _check_injective(name, out)


def _check_injective(name: str, out: Tensor) -> None:
    if out.numel() and overlaps_itself(out):
        raise ValueError(f"{name} {describe(out)}: several indices name one element")


def _check_overlap(name: str, out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """An output may be exactly an input of the rows, and otherwise has to lie apart."""
    for other_name, other in inputs.items():
        if other is not None and overlap_partly(out, other):
            raise ValueError(
                f"{name} {describe(out)}: lies partly over {other_name} {describe(other)}"
            )


def _check_apart(name: str, out: Tensor, others: dict[str, Tensor]) -> None:
    for other_name, other in others.items():
        if _share(out, other):
            raise ValueError(
                f"{name} {describe(out)}: shares elements with {other_name} {describe(other)}"
            )


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element in common, the whole view included."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    return overlap_partly(a, b) or a.data_ptr() == b.data_ptr()

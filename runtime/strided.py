"""Our Triton kernels behind the ops: they read any stride and write the layout that is asked for.

Allocates the results and calls the launchers of `fixpass.runtime.kernels`, which refuse what they
cannot compute with a ValueError before any launch. Triton is imported at the first call.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.gated_norm import Gating
from fixpass.runtime.kernels.checks import FLOATS, MAX_HIDDEN
from fixpass.runtime.norms import split_steps
from fixpass.runtime.quantized_norm import Quantization, empty_results
from fixpass.runtime.rotary_norm import Rotation, empty_rotated

MAX_RANK = 6


@cache
def is_available() -> bool:
    """Whether Triton is installed and has a device to run on."""
    return find_spec("triton") is not None and torch.cuda.is_available()


def can_compute(x: Tensor, steps: Mapping[str, Any], *others: Tensor) -> bool:
    """Whether the kernels take rows of x, and the other operands, with these rounding steps."""
    return (
        all(each.dtype in FLOATS for each in (x, *others))
        and steps.get("compute_dtype") in (None, torch.float32)
        and steps.get("out_dtype") in (None, *FLOATS)
        and 1 <= x.dim() <= MAX_RANK
        and x.shape[-1] <= MAX_HIDDEN
        and steps.get("group_size", 0).bit_count() <= 1
        and is_available()
    )


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **steps: Any
) -> Tensor:
    """`fixpass::rms_norm` of x (..., hidden_size) by a kernel of any layout."""
    from fixpass.runtime.kernels.rms_norm import rms_norm as launch

    return _norm(launch, x, weight, bias, eps, **steps)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **steps: Any
) -> Tensor:
    """`fixpass::layer_norm` of x (..., hidden_size) by a kernel of any layout."""
    from fixpass.runtime.kernels.rms_norm import layer_norm as launch

    return _norm(launch, x, weight, bias, eps, **steps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """`fixpass::add_rms_norm` of x and residual, each with its own strides."""
    from fixpass.runtime.kernels.add_rms_norm import add_rms_norm as launch

    _check_compute(compute_dtype)
    total_dtype = torch.promote_types(x.dtype, residual.dtype)
    total = empty_like(x, total_dtype, order)
    out = empty_like(x, out_dtype or total_dtype, order)
    launch(
        x, residual, weight, eps, out=out, sum_out=total, bias=bias, outputs_are_new=True, **steps
    )
    return out, total


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """`fixpass::qk_norm` in one launch, straight from a packed projection."""
    from fixpass.runtime.kernels.qk_norm import qk_norm as launch

    _check_compute(compute_dtype)
    outs = empty_like(q, out_dtype, order), empty_like(k, out_dtype, order)
    launch(
        q, k, q_weight, k_weight, eps, q_out=outs[0], k_out=outs[1], outputs_are_new=True, **steps
    )
    return outs


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    compute_dtype: torch.dtype | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """`fixpass::qk_norm_rope` in one launch, straight from a packed projection."""
    from fixpass.runtime.kernels.qk_norm_rope import qk_norm_rope as launch

    _check_compute(compute_dtype)
    q_out, k_out = empty_rotated(q, k, **steps)
    rotation, rest = split_steps(Rotation, steps)
    rest.pop("order", None)
    launch(
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        eps,
        q_out=q_out,
        k_out=k_out,
        rotation=rotation,
        outputs_are_new=True,
        **rest,
    )
    return q_out, k_out


def rms_norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    *,
    compute_dtype: torch.dtype | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fixpass::rms_norm_quant` of x, and of residual where there is one, in one launch."""
    from fixpass.runtime.kernels.rms_norm_quant import rms_norm_quant as launch

    _check_compute(compute_dtype)
    quantization, rest = split_steps(Quantization, steps)
    codes, scales, total = empty_results(x, residual, weight, bias, scale, eps, **steps)
    launch(
        x,
        residual,
        weight,
        bias,
        scale,
        eps,
        out=codes,
        sum_out=None if residual is None else total,
        scales=scales if scale is None else None,
        quantization=quantization,
        outputs_are_new=True,
        **rest,
    )
    return codes, scales, total


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    **steps: Any,
) -> Tensor:
    """`fixpass::gated_rms_norm` of x and gate, each with its own strides, in one launch."""
    from fixpass.runtime.kernels.gated_rms_norm import gated_rms_norm as launch

    _check_compute(compute_dtype)
    gating, rule = split_steps(Gating, steps)
    out = empty_like(x, out_dtype, order)
    launch(x, gate, weight, eps, out=out, gating=gating, outputs_are_new=True, **rule)
    return out


def _norm(
    launch: Callable[..., None],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    **steps: Any,
) -> Tensor:
    _check_compute(compute_dtype)
    out = empty_like(x, out_dtype, order)
    launch(x, weight, eps, out=out, bias=bias, outputs_are_new=True, **steps)
    return out


def empty_like(x: Tensor, dtype: torch.dtype | None, order: Sequence[int] | None) -> Tensor:
    """An uninitialised dense tensor of x's shape, its dimensions in `order`, outermost first."""
    if order is None:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return torch.empty_permuted(x.shape, tuple(order), dtype=dtype or x.dtype, device=x.device)


def _check_compute(compute_dtype: torch.dtype | None) -> None:
    if compute_dtype not in (None, torch.float32):
        raise ValueError(f"the strided kernels compute in float32, not in {compute_dtype}")

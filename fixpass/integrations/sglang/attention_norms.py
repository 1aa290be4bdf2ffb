"""SGLang's q and k norms on ROCm, read in place from the packed projection.

`apply_qk_norm` reshapes the slices q and k to rows, which copies both, because aiter's kernel reads
wrong rows of a strided tensor. This hook gives the slices to `fixpass::qk_norm`, whose kernel reads
strides, in one launch. Calls of any other kind stay SGLang's.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.runtime import strided

LAYERNORM = "sglang.srt.layers.layernorm"
TARGET = "sglang.srt.models.utils.apply_qk_norm"


def read_in_place(
    engines: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    q_norm: nn.Module,
    k_norm: nn.Module,
    head_dim: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """An AROUND hook of `apply_qk_norm`.

    Args:
        engines: SGLang's function.
        q: the queries of all heads, (tokens, heads * head_dim).
        k: the keys, with heads of their own.
        q_norm: SGLang's RMSNorm of one query head.
        k_norm: SGLang's RMSNorm of one key head.
        head_dim: the size of a head.
        args: the other arguments of SGLang's function.
        kwargs: its other keyword arguments.

    Returns:
        The normalised q and k, dense, in their shapes.
    """
    is_ours = (
        not is_dynamo_compiling()
        and not (q.is_contiguous() and k.is_contiguous())
        and bool(q.numel() and k.numel())
        and q.dtype == k.dtype
        and _is_plain(q, q_norm)
        and _is_plain(k, k_norm)
        and q_norm.variance_epsilon == k_norm.variance_epsilon
    )
    if not is_ours:
        found: tuple[Tensor, Tensor] = engines(q, k, q_norm, k_norm, head_dim, *args, **kwargs)
        return found
    eps: Any = q_norm.variance_epsilon
    heads = [x.view(*x.shape[:-1], -1, head_dim) for x in (q, k)]
    weights = [norm.weight.data for norm in (q_norm, k_norm)]
    new_q, new_k = torch.ops.fixpass.qk_norm(*heads, *weights, eps)
    return new_q.view(q.shape), new_k.view(k.shape)


def _is_plain(x: Tensor, norm: Any) -> bool:
    """Whether the norm is what aiter's kernel computes: rounded once, over a whole head."""
    module: Any = importlib.import_module(LAYERNORM)
    return (
        type(norm) is module.RMSNorm
        and norm._forward_method.__name__ == "forward_aiter"
        and norm.variance_size_override is None
        and not norm.cast_x_before_out_mul
        and not norm.x_pad_to_multiple
        and norm.weight.dtype == x.dtype
        and x.stride(-1) == 1
        and not module.is_batch_invariant_mode_enabled()
        and strided.can_compute(x, {})
    )

"""The meaning of `fixpass::qk_norm_rope`, written in PyTorch: RMS norms of q and k, then RoPE.

These functions are the truth, as in `fixpass.runtime.norms`: kernels are compared with them, and
Inductor compiles them. They choose no kernel and read no layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import norms


@dataclass(frozen=True)
class Rotation:
    """How the values of a head are rotated. Each dtype is one rounding step, in this order.

    A pair (a, b) becomes (a * cos - b * sin, b * cos + a * sin). The products and their sum are
    rounded to the dtype that PyTorch's type promotion gives them.
    """

    rotary_dim: int
    """The values at the front of a head that are rotated; the others stay."""
    head_size: int = 0
    """The size of a head, where a normalised row holds several; 0: a row is a head."""
    interleaved: bool = False
    """Pairs are neighbours (GPT-J). False: a pair is one value of each half (NeoX)."""
    rope_dtype: torch.dtype | None = None
    """The dtype of the values that are rotated; None means that of the norm."""
    result_dtype: torch.dtype | None = None
    """The dtype of the result; None means that of the norm."""


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    order: list[int] | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """Return the rotated RMS norms of q and k, each of its own shape.

    q: (..., hidden_size); k may have other rows. cos, sin: (..., rotary_dim), or half of that,
    where both values of a pair have one angle. They broadcast to the rows of q and of k.
    """
    rotation, norm_steps = norms.split_steps(Rotation, steps)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = norms.rms_norm(x, eps, norms.Affine(weight, **norm_steps))
        results.append(norms.with_order(rotate(y, cos, sin, rotation), order))
    return results[0], results[1]


def rotate(y: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """`y` (..., hidden_size) with its heads rotated."""
    values = y.to(rotation.rope_dtype or y.dtype)
    if rotation.head_size:
        values = values.unflatten(-1, (-1, rotation.head_size))
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    size = rotation.rotary_dim
    a, b = _pairs(values[..., :size], rotation)
    cos_a, cos_b = _table(cos, rotation)
    sin_a, sin_b = _table(sin, rotation)
    rotated = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    result = (
        torch.stack(rotated, -1).flatten(-2) if rotation.interleaved else torch.cat(rotated, -1)
    )
    result = result.to(rotation.result_dtype or y.dtype)
    if size < values.shape[-1]:
        result = torch.cat((result, values[..., size:].to(result.dtype)), -1)
    return result.flatten(-2) if rotation.head_size else result


def empty_rotated(
    q: Tensor,
    k: Tensor,
    *_: Any,
    out_dtype: torch.dtype | None = None,
    result_dtype: torch.dtype | None = None,
    order: list[int] | None = None,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of `qk_norm_rope`: for kernels to fill, and with fake operands."""
    dtype = result_dtype or out_dtype or q.dtype
    order = order or list(range(q.dim()))
    results = (torch.empty_permuted(x.shape, order, dtype=dtype, device=x.device) for x in (q, k))
    return next(results), next(results)


def _pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    if rotation.interleaved:
        return x[..., ::2], x[..., 1::2]
    half = rotation.rotary_dim // 2
    return x[..., :half], x[..., half:]


def _table(table: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The factors of the first and the second value of each pair."""
    if table.shape[-1] == rotation.rotary_dim:
        return _pairs(table, rotation)
    return table, table

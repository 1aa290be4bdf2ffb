"""The meaning of `fixpass::gated_rms_norm`, written in PyTorch: an RMS norm with a gate.

    gate_first=False    norm(x) * weight * activation(gate)
    gate_first=True     norm(x * activation(gate)) * weight

These functions are the truth, as in `fixpass.runtime.norms`: kernels are compared with them, and
Inductor compiles them. They choose no kernel and read no layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fixpass.runtime import norms

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class Gating:
    """How the gate is applied, and where the values around it are rounded.

    The activation of the gate is computed in float32 and rounded to `gate_dtype`. The product with
    x or with the norm has the dtype that PyTorch's type promotion gives it.
    """

    activation: str
    """A name of ACTIVATIONS."""
    gate_first: bool = False
    """Whether x is gated and then normalised. False: the norm is gated."""
    group_size: int = 0
    """The neighbouring values of a row that are normalised together; 0 means the whole row."""
    gate_dtype: torch.dtype | None = None
    """None means float32."""
    normed_dtype: torch.dtype | None = None
    """The dtype to which the norm, with its weight, is rounded in front of its gate; None means
    that of x. Without effect where `gate_first` is set."""

    @property
    def rounded_gate(self) -> torch.dtype:
        return self.gate_dtype or torch.float32


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    order: list[int] | None = None,
    **steps: Any,
) -> Tensor:
    """Return the gated RMS norm of x (..., hidden_size); the gate has the shape of x.

    weight: (hidden_size,), also where groups of a row are normalised.
    """
    gating, rules = norms.split_steps(Gating, steps)
    scale = _activate(gate, gating)
    result = out_dtype or x.dtype
    if gating.gate_first:
        y = _norm(x * scale, weight, eps, gating.group_size, out_dtype=result, **rules)
    else:
        normed = gating.normed_dtype or x.dtype
        y = _norm(x, weight, eps, gating.group_size, out_dtype=normed, **rules) * scale
    return norms.with_order(y.to(result), order)


def _activate(gate: Tensor, gating: Gating) -> Tensor:
    # An activation computes 16-bit values in float32 and rounds the result, by itself.
    dtype = gating.rounded_gate
    values = gate if gate.dtype == dtype else gate.to(torch.float32)
    return ACTIVATIONS[gating.activation](values).to(dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float, group_size: int, **rules: Any) -> Tensor:
    if not group_size:
        return norms.rms_norm_values(x, eps, norms.Affine(weight, **rules))
    groups = (-1, group_size)
    weight = None if weight is None else weight.unflatten(0, groups)
    affine = norms.Affine(weight, **rules)
    return norms.rms_norm_values(x.unflatten(-1, groups), eps, affine).flatten(-2)

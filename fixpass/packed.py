"""Merge q, k and v projections into one, as serving engines run them.

The attention's own code then gets strided slices of one packed tensor, which is where norm
kernels and models disagree. For `transformers` classes whose attention has `q_proj`, `k_proj`
and `v_proj`; the result computes what the original did.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """The columns [start, stop) of a packed projection, as a view."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, packed: Tensor) -> Tensor:
        return packed[..., self.start : self.stop]


def pack_qkv(model: nn.Module) -> nn.Module:
    """Pack every attention of `model` in place and return the model.

    Raises ValueError when no module has q_proj, k_proj and v_proj.
    """
    found = [m for m in model.modules() if all(hasattr(m, f"{n}_proj") for n in "qkv")]
    for attention in found:
        _pack(attention)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention with q_proj, k_proj and v_proj")
    return model


def _pack(attention: Any) -> None:
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weights = [p.weight for p in projections]
    rows = sum(w.shape[0] for w in weights)
    has_bias = projections[0].bias is not None
    packed = nn.Linear(weights[0].shape[1], rows, has_bias, weights[0].device, weights[0].dtype)
    with torch.no_grad():
        packed.weight.copy_(torch.cat(weights))
        if has_bias:
            packed.bias.copy_(torch.cat([p.bias for p in projections]))
    start = 0
    for name, weight in zip("qkv", weights, strict=True):
        setattr(attention, f"{name}_proj", Part(start, start + weight.shape[0]))
        start += weight.shape[0]
    attention.qkv_proj = packed
    attention.__class__ = _packed_class(type(attention))


def _packed_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` that projects once and hands the packed tensor to the parts."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, self.qkv_proj(hidden_states), *args, **kwargs)

    return type(f"Packed{base.__name__}", (base,), {"forward": forward})

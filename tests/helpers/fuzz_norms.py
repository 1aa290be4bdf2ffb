"""Norms as plain data: a `Form` says how one norm is spelled, `normalise` computes it that way.

A form with a `twist` is nearly a norm, or a norm that must not be taken apart: what it computes
has to stay as it is. Nothing here is random.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)


class Spec:
    """Plain data that prints as the call that makes it, without the fields left at a default."""

    def __repr__(self) -> str:
        given = [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis and IPython call instead of repr."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Form(Spec):
    """One spelling of RMSNorm, or of LayerNorm where it is `centred`."""

    via: str = "written"
    """"written" out in PyTorch, "functional" (torch.nn.functional), or the fixpass "op"."""
    centred: bool = False
    eps: float = 1e-6
    upcast: torch.dtype | None = torch.float32
    square: str = "pow"
    root: str = "rsqrt"
    scale_first: bool = False
    scales_raw: bool = False
    """Scale the input, not its upcast copy; the product is promoted."""
    rounds: str = "before"
    """"before" or "after" the weight is applied, or "never"."""
    weight: torch.dtype | None = None
    weight_first: bool = False
    widens_weight: bool = False
    offset: float = 0.0
    has_bias: bool = False
    twist: str = ""


SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": lambda h: h.pow(2),
    "mul": lambda h: h * h,
    "square": torch.square,
}
# Of a moment and eps: what the input is multiplied by.
ROOTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rsqrt": lambda v, eps: torch.rsqrt(v + eps),
    "eps first": lambda v, eps: torch.rsqrt(eps + v),
    "1 / sqrt": lambda v, eps: 1.0 / torch.sqrt(v + eps),
    "sqrt ** -1": lambda v, eps: torch.sqrt(v + eps).reciprocal(),
    "pow": lambda v, eps: (v + eps).pow(-0.5),
    "**": lambda v, eps: (v + eps) ** -0.5,
}
TWISTS = (
    "",
    "no keepdim",
    "other dimension",
    "all dimensions",
    "unbiased",
    "scale is used twice",
    "moment is used twice",
    "other factor",
    "eps twice",
    "half the moment",
)


def normalise(form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if form.via == "functional":
        return _functional(form, x, weight, bias)
    if form.via == "op":
        return _op(form, x, weight, bias)
    y = _scaled(form, x)
    if form.rounds == "before":
        y = y.to(x.dtype)
    if weight is not None:
        w = weight.float() if form.widens_weight else weight
        w = w + form.offset if form.offset else w
        y = w * y if form.weight_first else y * w
    if bias is not None:
        y = y + bias
    return y.to(x.dtype) if form.rounds == "after" else y


def _functional(form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if form.centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)
    return F.rms_norm(x, x.shape[-1:], weight, form.eps)


def _op(form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    op = torch.ops.fixpass.layer_norm if form.centred else torch.ops.fixpass.rms_norm
    norm_dtype = x.dtype if form.rounds == "before" else None
    weight_dtype = torch.float32 if form.widens_weight else None
    return op(
        x,
        weight,
        bias,
        form.eps,
        weight_offset=form.offset,
        norm_dtype=norm_dtype,
        weight_dtype=weight_dtype,
    )


def _scaled(form: Form, x: Tensor) -> Tensor:
    raw = h = x if form.upcast is None else x.to(form.upcast)
    keep = form.twist != "no keepdim"
    dim = {"other dimension": 0, "all dimensions": tuple(range(x.dim()))}.get(form.twist, -1)
    if form.centred:
        h = h - h.mean(dim, keepdim=keep)
    if form.square in SQUARES:
        moment = SQUARES[form.square](h).mean(dim, keepdim=keep)
    elif form.square == "var_mean":
        moment, _ = torch.var_mean(raw, dim, unbiased=form.twist == "unbiased", keepdim=keep)
    else:
        moment = raw.var(dim, unbiased=form.twist == "unbiased", keepdim=keep)
    shared = moment
    if form.twist == "half the moment":
        moment = moment * 0.5
    if form.twist == "eps twice":
        moment = moment + 0.25
    if form.twist == "other factor":
        h = h * 2.0
    return _multiplied(form, x, h, moment, shared)


def _multiplied(form: Form, x: Tensor, h: Tensor, moment: Tensor, shared: Tensor) -> Tensor:
    if form.root == "/ sqrt":
        return h / torch.sqrt(moment + form.eps)
    scale = ROOTS[form.root](moment, form.eps)
    factor = x if form.scales_raw and not form.centred else h
    y = scale * factor if form.scale_first else factor * scale
    if form.twist == "scale is used twice":
        y = y + scale
    if form.twist == "moment is used twice":
        y = y + shared
    return y

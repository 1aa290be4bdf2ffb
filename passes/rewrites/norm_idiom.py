"""RMSNorm and LayerNorm written out in PyTorch become `fixpass::rms_norm` and `layer_norm`.

    y = h * rsqrt(mean(h * h) + eps),  h = x or x - mean(x), upcast or not
    y = cast(y) * weight + bias, cast

eps, dtypes and the order of casts are read from the graph. A statistic that something else needs
too, such as the backward pass, stays: computing it twice would cost more than it saves.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fixpass.lowering.layout import Layout
from fixpass.passes.rewrite import NOT_OURS, Match, Missed, Rewrite, val_of
from fixpass.passes.rewrites.norm import Norm, build_norm, compute_step, out_steps
from fixpass.passes.rewrites.norm_affine import read_affine
from fixpass.passes.rewrites.norm_scale import ROOTS, read_scale


@dataclass(frozen=True)
class NormIdiom(Rewrite):
    """Anchored at the reciprocal root."""

    anchors = ROOTS

    def match(self, anchor: fx.Node) -> Norm | Missed:
        scale = read_scale(anchor)
        if isinstance(scale, Missed):
            return scale
        tail = read_affine(scale)
        x, out = val_of(scale.x), val_of(tail.last)
        if x is None or out is None:
            return NOT_OURS
        steps = out_steps(x, out)
        if isinstance(steps, Missed):
            return steps
        steps = {**tail.steps, **compute_step(x, scale.compute_dtype), **steps}
        inputs = (scale.x, tail.weight, tail.bias)
        return Norm((tail.last,), _text(scale.op, x), 0, scale.op, inputs, scale.eps, steps)

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        last = match.replaced[0]
        return (build_norm(graph, match, last, last.meta["val"]),)


def _text(op: str, x: torch.Tensor) -> str:
    return f"became {op} of {Layout.of(x)}"

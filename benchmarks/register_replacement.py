"""The norm rewrites of `canonicalize-norms` through `torch._inductor`'s `register_replacement`.

Two traced patterns: the residual add with its norm, and the norm alone. One spelling, one eps and
one dtype are all they match, which is what the synthetic graphs hold.
"""

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._subclasses.fake_tensor import FakeTensorMode

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from benchmarks.graphs import EPS, HIDDEN_SIZE, NUM_ROWS


def norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(torch.bfloat16)


def new_norm(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.fixpass.rms_norm(x, weight, None, EPS, norm_dtype=torch.bfloat16)
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight), total


def new_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = torch.ops.fixpass.add_rms_norm(
        x, residual, weight, None, EPS, norm_dtype=torch.bfloat16
    )
    return out


def make_pass() -> PatternMatcherPass:
    """A pass with both patterns, traced here, before any time is taken."""
    patterns = PatternMatcherPass("norms")
    with FakeTensorMode():
        x, residual = (torch.empty(NUM_ROWS, HIDDEN_SIZE, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16)
        register_replacement(
            add_norm, new_add_norm, [x, residual, weight], fwd_only, patterns, pattern_name="add"
        )
        register_replacement(norm, new_norm, [x, weight], fwd_only, patterns, pattern_name="norm")
    return patterns


def owned(graph: fx.Graph) -> fx.Graph:
    """The same nodes in a graph with a module around it, which the matcher asks for."""
    return fx.GraphModule({}, graph).graph

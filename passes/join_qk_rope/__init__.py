"""RMS norms of q and k and the rotations (RoPE) behind them become `fixpass::qk_norm_rope`.

Runs before the kernels are chosen. Two norms are joined where the same cos and sin rotate both.
Nothing is joined where the target has no kernel for the op: Inductor compiles the model's own code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.target import Target
from fixpass.passes.base import JOINED_MODULES, Pass, PassResult, module_path
from fixpass.passes.join_qk_rope.qk_pair import Tables, describe, join, why_apart
from fixpass.passes.join_qk_rope.rotated_norm import RotatedNorm, read_rotated
from fixpass.passes.rewrite import Missed, erase_dead, find_anchors

KERNEL = "strided_qk_norm_rope"
NORMS = (torch.ops.fixpass.rms_norm.default, torch.ops.fixpass.layer_norm.default)


@dataclass(frozen=True)
class JoinQkRope(Pass):
    """Two norms and their rotations, as one op."""

    name: ClassVar[str] = "join-qk-rope"

    target: Target
    """It must list the kernel `strided_qk_norm_rope`."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        if not self.target.has(KERNEL):
            return
        waiting: RotatedNorm | None = None
        tables: Tables = {}
        for norm in list(find_anchors(graph, NORMS)):
            seen = read_rotated(norm)
            if isinstance(seen, Missed):
                if seen.why:
                    result.missed(norm, seen.why)
                continue
            if waiting is None:
                waiting = seen
                continue
            wrong = why_apart(waiting, seen)
            if wrong:
                result.missed(waiting.norm, f"not joined with {seen.norm.name}: {wrong}")
                waiting = seen
                continue
            if not result.take_fuel():
                return
            _replace(graph, waiting, seen, tables, result)
            waiting = None
        if waiting is not None:
            result.missed(waiting.norm, "the same cos and sin rotate no other norm")


def _replace(
    graph: fx.Graph, q: RotatedNorm, k: RotatedNorm, tables: Tables, result: PassResult
) -> None:
    joined, parts = join(graph, q, k, tables)
    joined.meta[JOINED_MODULES] = (module_path(q.norm), module_path(k.norm))
    result.applied(joined, describe(q, k))
    for each, part in zip((q, k), parts, strict=True):
        each.root.replace_all_uses_with(part)
    for each in (q, k):
        erase_dead(graph, each.root)

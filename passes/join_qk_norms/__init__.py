"""Norms of q and k over one packed tensor become one launch, where our kernel computes both.

Runs after the kernels are chosen: what Inductor compiles fuses by itself, and other libraries'
kernels have no such launch.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.join_qk_norms.packed_qk import JOINED, QkNorm
from fixpass.passes.rewrite import apply_rewrite


@dataclass(frozen=True)
class JoinQkNorms(Pass):
    """Two strided norms of one packed tensor, launched as one."""

    name: ClassVar[str] = "join-qk-norms"

    target: Target
    """It must list the kernel `strided_qk_norm`."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        if self.target.has(JOINED):
            apply_rewrite(graph, QkNorm(), result)

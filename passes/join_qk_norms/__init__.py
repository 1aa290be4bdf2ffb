"""Norms of q and k over one packed tensor become one launch of our kernel.

Runs after the kernels are chosen. Inductor generates a kernel for each of the two norms; they are
joined where that kernel fuses with nothing else. Other libraries have no kernel for both.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.lowering.target import FALLBACK, Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.join_qk_norms.packed_qk import JOINED, KERNEL, QkNorm
from fixpass.passes.rewrite import apply_rewrite


@dataclass(frozen=True)
class JoinQkNorms(Pass):
    """Two norms of one packed tensor, launched as one."""

    name: ClassVar[str] = "join-qk-norms"

    target: Target
    """It must list the kernel `strided_qk_norm`."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        if self.target.has(JOINED):
            kernels = (KERNEL, FALLBACK) if self.target.prefers_fusion else (KERNEL,)
            apply_rewrite(graph, QkNorm(kernels), result)

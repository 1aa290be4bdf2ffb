"""Every spelling of RMSNorm and LayerNorm becomes `fixpass::rms_norm` and its siblings.

Runs on the functional ATen graph. Five rewrites, each anchored at an op: norms written out, norm
ops of other libraries, the residual add in front, the quantisation behind it, and its gate. No
kernel is chosen.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.gated import GatedNorm
from fixpass.passes.canonicalize_norms.idiom import NormIdiom
from fixpass.passes.canonicalize_norms.opaque import OpaqueNormRewrite
from fixpass.passes.canonicalize_norms.quantized import QuantizedNorm
from fixpass.passes.canonicalize_norms.residual import ResidualNorm
from fixpass.passes.rewrite import apply_rewrite


@dataclass(frozen=True)
class CanonicalizeNorms(Pass):
    """Idioms and foreign ops to `fixpass::` norm ops."""

    name: ClassVar[str] = "canonicalize-norms"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        # First the ops that stand in the graph already: the others join a residual by themselves.
        # Quantisation and gates are joined last: they start from the ops that the others make.
        first = (ResidualNorm(), OpaqueNormRewrite(), NormIdiom())
        for rewrite in (*first, QuantizedNorm(), GatedNorm()):
            apply_rewrite(graph, rewrite, result)

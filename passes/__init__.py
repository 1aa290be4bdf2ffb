"""Graph in, graph out: the passes of fixpass and the order in which they run."""

from fixpass.lowering.target import Target
from fixpass.passes.base import Pass
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.drop_dead_copies import DropDeadCopies
from fixpass.passes.fold_weights import FoldWeights
from fixpass.passes.functionalize_norms import FunctionalizeNorms
from fixpass.passes.insert_relayout import InsertRelayout
from fixpass.passes.join_linears import JoinLinears
from fixpass.passes.join_qk_norms import JoinQkNorms
from fixpass.passes.join_qk_rope import JoinQkRope
from fixpass.passes.lower_norms import LowerNorms
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.passes.select_norm_kernel import SelectNormKernel


def entry_passes(
    folds: FoldWeights | None = None, prepack: PrepackLinears | None = None
) -> tuple[Pass, ...]:
    """The passes on Dynamo's graph. They run at every compile, also when a cache is warm.

    folds, prepack: the passes for weights, configured for this process and machine.
    """
    return (
        # Before AOTAutograd, which would wrap an op that writes into its arguments.
        FunctionalizeNorms(),
        # Here and nowhere later: the live parameters are at hand, and no cache skips it.
        folds or FoldWeights(),
        # Behind the folds, whose values it packs.
        prepack or PrepackLinears(),
    )


def default_passes(
    target: Target,
    collectives: PlaceSymmetricMemory | None = None,
    linears: SelectLinearKernel | None = None,
) -> tuple[Pass, ...]:
    """The passes on the functional ATen graph, in order.

    collectives, linears: passes that know this process's groups and kernels; None: the defaults.
    """
    return (
        # First: everything after it sees one spelling of each norm.
        CanonicalizeNorms(),
        # Before the choice of kernel, which compares the joined op with Inductor's code.
        JoinQkRope(target),
        # Before any relayout: the choice of kernel decides which one is needed, if any.
        SelectNormKernel(target),
        # Makes the chosen kernel's contract hold.
        InsertRelayout(),
        # After the relayouts, so that no copy is dropped that a kernel turned out to need.
        DropDeadCopies(),
        # Behind the dropped copies, which may have stood between q or k and the packed tensor.
        JoinQkNorms(target),
        # Norms behind an all-reduce are settled; nothing above looks at collectives.
        collectives or PlaceSymmetricMemory(target),
        # Behind the collectives: the matmul of a row-parallel layer belongs to its all-reduce.
        linears or SelectLinearKernel(),
        # Joins the layers whose kernel takes several weights.
        JoinLinears(target.device_type if linears else "cpu"),
        # Last: what Inductor compiles becomes plain operations again and fuses.
        LowerNorms(),
    )

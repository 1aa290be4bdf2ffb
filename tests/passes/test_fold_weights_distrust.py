"""fold-weights: weights whose changes might not be seen stay in the graph."""

import torch
from expecttest import assert_expected_inline
from torch import nn

from fixpass import Pipeline
from fixpass.aot_eager import copy_graph
from fixpass.passes.fold_weights import FoldWeights
from fixpass.testing import f32
from helpers.weight_updates import Reads


def only(step, module):
    """What one pass says of a module in inference."""
    found = []

    def backend(gm, example_inputs):
        # A copy: Dynamo would take a new input for one of its own.
        found.append(str(Pipeline((step,), strict=True).run(copy_graph(gm.graph))))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(f32(3, 64))
    return found[0]


def test_parameters_that_fsdp_may_refill_are_missed_and_buffers_are_not():
    step = FoldWeights(uses_fsdp=True)
    assert_expected_inline(
        only(step, Reads(lambda weight: weight.t().contiguous())),
        """\
fold-weights
    missed  contiguous: weight may be refilled by FSDP, which hides that from the count of writes
""",
    )
    of_buffer = Reads(lambda weight: weight.t().contiguous(), of_buffer=True)
    assert "applied" in only(step, of_buffer)


def test_weights_on_other_devices_are_folded_where_that_is_asked_for():
    weight = nn.Parameter(torch.empty(4, device="meta"))
    assert_expected_inline(
        FoldWeights(explicit=False)._distrust(weight),
        """is on meta, where a write through .data is not seen: options={"fold_weights": "cache"} folds it all the same""",
    )
    assert FoldWeights(explicit=True)._distrust(weight) == ""

"""vLLM's own linear kernels on CPU: the report names each, and the graph stays as it is.

Stand-ins have the names and schemas of vLLM's ops; tests/engines runs the real ones.
"""

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.integrations.vllm.own_linears import KeepVllmLinears
from fixpass.testing import f32, text, trace

KEY = "CompositeExplicitAutograd"
OPS = {
    "onednn_mm": "(Tensor! c, Tensor a, Tensor? bias, int handler) -> ()",
    "weight_packed_linear": "(Tensor a, Tensor b, Tensor? bias, bool is_vnni) -> Tensor",
}


@pytest.fixture(scope="module", autouse=True)
def ops():
    with torch.library._scoped_library("_C", "FRAGMENT") as library:
        for name, schema in OPS.items():
            library.define(f"{name}{schema}")
        library.impl("onednn_mm", lambda c, *_: None, KEY)
        library.impl("weight_packed_linear", lambda a, b, *_: a.new_empty(len(a), len(b)), KEY)
        yield torch.ops._C


def layers(x, weight):
    """Two layers of a kind that writes into a buffer, one that returns its result, one matmul."""
    out = x.new_empty(4, 8)
    for _ in range(2):
        torch.ops._C.onednn_mm(out, x, None, 1)
    return torch.ops._C.weight_packed_linear(out, weight, None, True) + torch.mm(out, weight.t())


def test_each_kernel_is_named_once_with_the_number_of_its_layers():
    gm = trace(layers, f32(4, 8), f32(8, 8))
    before = text(gm.graph)
    report = Pipeline((KeepVllmLinears(),), strict=True).run(gm.graph)
    assert text(gm.graph) == before
    assert_expected_inline(
        str(report),
        """\
keep-vllm-linears
    missed  auto_functionalized_v2: vLLM's own _C::onednn_mm computes 2 linear layers: it has packed their weights
    missed  weight_packed_linear: vLLM's own _C::weight_packed_linear computes 1 linear layer: it has packed their weights
""",
    )


def test_a_graph_without_them_has_no_remark():
    gm = trace(torch.mm, f32(4, 8), f32(8, 8))
    assert Pipeline((KeepVllmLinears(),), strict=True).run(gm.graph).remarks == ()

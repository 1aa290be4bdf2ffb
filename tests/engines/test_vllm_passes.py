"""vLLM's real IR ops in our passes; no engine is started."""

import pytest
import torch
import vllm.ir.ops  # noqa: F401  (registers the ops)
from torch import fx
from vllm.config import VllmConfig

from fixpass import Pipeline
from fixpass.integrations.vllm import engine_config as plugin
from fixpass.integrations.vllm.ir import FunctionalizeVllmIr, LowerVllmIr
from fixpass.lowering.target import CPU
from fixpass.passes import default_passes
from fixpass.testing import assert_same, f32, text, trace

pytestmark = pytest.mark.engine
ir = torch.ops.vllm_ir


def lowered(function, *args):
    """The graph of `function` behind our passes and the lowering, and the report."""
    gm = trace(function, *args)
    pipeline = Pipeline((*default_passes(CPU), LowerVllmIr()), verify=True, strict=True)
    report = pipeline.run(gm.graph)
    gm.recompile()
    assert "vllm_ir" not in text(gm.graph)
    return gm, report


def partial_norm(x, weight):
    return ir.rms_norm(x, weight, 1e-6, 16)


def activation(x):
    return ir.gelu_and_mul_sparse(x, 1.5, "tanh")


def test_a_norm_of_a_part_of_the_row_is_lowered_as_vllm_would():
    x, weight = f32(5, 64), f32(64)
    gm, report = lowered(partial_norm, x, weight)
    (line,) = [remark.text for remark in report.of_pass("lower-vllm-ir")]
    assert line == "rms_norm became native operations of f32[5, 64]"
    (missed,) = report.of_kind("missed")
    assert missed.text == "vllm_ir::rms_norm is called with variance_size=16"
    torch.testing.assert_close(gm(x, weight)[0], partial_norm(x, weight))


def test_lengths_may_be_symbolic():
    options = {"lower": "eager", "passes": (LowerVllmIr(),), "verify": True, "strict": True}
    compiled = torch.compile(partial_norm, backend="fixpass", dynamic=True, options=options)
    for rows in (5, 9):
        assert_same(compiled, partial_norm, f32(rows, 64), f32(64))


def test_an_op_that_is_no_norm_is_lowered_too():
    gm, _ = lowered(activation, f32(4, 64))
    x = f32(4, 64)
    torch.testing.assert_close(gm(x)[0], activation(x))


def test_an_add_with_a_norm_of_a_part_gives_both_results():
    def function(x, residual, weight):
        return ir.fused_add_rms_norm(x, residual, weight, 1e-6, 16)

    args = f32(4, 64), f32(4, 64), f32(64)
    gm, _ = lowered(function, *args)
    for out, wanted in zip(gm(*args), function(*args), strict=True):
        torch.testing.assert_close(out, wanted)


def test_an_op_that_may_write_into_its_activations_becomes_the_functional_one():
    def function(x, residual, weight):
        return ir.fused_add_rms_norm.maybe_inplace(x * 2, residual * 2, weight, 1e-6)

    def backend(gm, example_inputs):
        report = Pipeline((FunctionalizeVllmIr(),), strict=True).run(gm.graph)
        assert report.remarks == ()
        targets = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
        assert "vllm_ir.fused_add_rms_norm.default" in targets
        assert isinstance(gm.graph, fx.Graph)
        gm.recompile()
        return gm.forward

    args = f32(4, 64), f32(4, 64), f32(64)
    assert_same(torch.compile(function, backend=backend), function, *args)


def test_the_hook_stands_in_the_real_configuration():
    plugin.register()
    assert VllmConfig.__post_init__.__module__ == plugin.__name__

"""functionalize-norms: ops that write into their arguments, on Dynamo's graph."""

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.passes.functionalize_norms import FunctionalizeNorms
from fixpass.testing import assert_same, bf16
from helpers import standins


@pytest.fixture(autouse=True)
def _libraries():
    standins.register()


def rewritten(fn, *args):
    """Dynamo's graph after the pass as lines of code, and the report."""
    found = []

    def backend(gm, example_inputs):
        report = Pipeline((FunctionalizeNorms(),), strict=True).run(gm.graph)
        gm.recompile()
        found.append((gm.code, str(report)))
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    code, report = found[0]
    lines = (line.split(";")[0].strip() for line in code.splitlines())
    kept = [line for line in lines if " = " in line or line.startswith("return")]
    return "\n".join(kept) + "\n", report


def into_fresh(x, weight):
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    return out + 1


def into_given(out, x, weight):
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    return out + 1


def in_place(x, residual, weight):
    torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
    return x * 2, residual


def test_a_fresh_result_is_used_directly():
    graph, report = rewritten(into_fresh, bf16(4, 64), bf16(64))
    assert_expected_inline(
        graph,
        """\
l_x_ = L_x_
l_weight_ = L_weight_
out = torch.empty_like(l_x_)
rms_norm_default = torch.ops.fixpass.rms_norm.default(l_x_, l_weight_, None, 1e-06, norm_dtype = torch.bfloat16)
add = rms_norm_default + 1
return (add,)
""",
    )
    assert_expected_inline(
        report,
        """\
functionalize-norms
    applied rms_norm_default: _C::rms_norm became rms_norm of bf16[4, 64]
""",
    )


def test_a_result_that_was_given_is_written_by_copy():
    graph, _ = rewritten(into_given, bf16(4, 64), bf16(4, 64), bf16(64))
    assert_expected_inline(
        graph,
        """\
l_out_ = L_out_
l_x_ = L_x_
l_weight_ = L_weight_
rms_norm_default = torch.ops.fixpass.rms_norm.default(l_x_, l_weight_, None, 1e-06, norm_dtype = torch.bfloat16)
copy_ = l_out_.copy_(rms_norm_default)
add = l_out_ + 1
return (add,)
""",
    )


def test_an_op_in_place_writes_both_operands():
    graph, _ = rewritten(in_place, bf16(4, 64), bf16(4, 64), bf16(64))
    assert_expected_inline(
        graph,
        """\
l_x_ = L_x_
l_residual_ = L_residual_
l_weight_ = L_weight_
add_rms_norm_default = torch.ops.fixpass.add_rms_norm.default(l_x_, l_residual_, l_weight_, None, 1e-06, norm_dtype = torch.bfloat16)
getitem = add_rms_norm_default[0]
getitem_1 = add_rms_norm_default[1]
copy_ = l_x_.copy_(getitem)
copy__1 = l_residual_.copy_(getitem_1)
mul = l_x_ * 2
return (mul,)
""",
    )


def test_operands_of_other_shapes_are_missed():
    def broadcast(out, x, weight):
        torch.ops.sgl_kernel.rmsnorm(out, x, weight, 1e-6, False)
        return x

    _, report = rewritten(broadcast, bf16(2, 4, 64), bf16(4, 64), bf16(64))
    assert_expected_inline(
        report,
        """\
functionalize-norms
    missed  rmsnorm: sgl_kernel::rmsnorm: output bf16[2, 4, 64] has another shape than input bf16[4, 64]
""",
    )


@pytest.mark.parametrize("fn", [into_given, in_place])
def test_inputs_are_mutated_as_in_eager(fn):
    args = [bf16(4, 64), bf16(4, 64), bf16(64)]
    options = {"lower": "eager", "verify": True, "strict": True}
    compiled = torch.compile(fn, backend="fixpass", options=options)
    mine, theirs = [a.clone() for a in args], [a.clone() for a in args]
    torch.testing.assert_close(compiled(*mine), fn(*theirs))
    torch.testing.assert_close(mine, theirs)


def test_a_fresh_result_that_was_read_before_is_written_by_copy():
    def read_before(x, weight):
        out = torch.empty_like(x)
        out.fill_(3.0)
        total = out.sum()
        torch.ops._C.rms_norm(out, x, weight, 1e-6)
        return out, total

    options = {"lower": "eager", "verify": True, "strict": True}
    compiled = torch.compile(read_before, backend="fixpass", options=options)
    assert_same(compiled, read_before, bf16(4, 64), bf16(64))

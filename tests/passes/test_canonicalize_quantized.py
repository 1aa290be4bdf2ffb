"""canonicalize-norms, quantised output: which spellings become one op, and what stops the others."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch._inductor import metrics

from fixpass import Pipeline
from fixpass.lowering.target import Target, target_named
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.insert_relayout import InsertRelayout
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.testing import bf16, f32, text, trace
from helpers.compiling import compiled
from helpers.quantized_spellings import (
    E4M3FN,
    add_per_group,
    add_static,
    clamped_before_it_is_rounded,
    fnuz,
    per_group,
    per_token,
    per_token_int8,
    per_token_of_torchao,
    rows,
    static,
    static_divided,
    static_inverse,
)
from helpers.spellings import llama

PIPELINE = Pipeline((CanonicalizeNorms(),), verify=True, strict=True)


def rewritten(fn, *args, pipeline=PIPELINE, **kwargs):
    gm = trace(fn, *args, **kwargs)
    report = pipeline.run(gm.graph)
    return text(gm.graph), str(report)


ONE = torch.tensor([0.0123])
SPELLINGS = {
    per_token: (rows(6, 256), rows(256)),
    per_token_of_torchao: (rows(6, 256), rows(256)),
    per_group: (rows(6, 256), rows(256)),
    per_token_int8: (rows(2, 3, 256), rows(256)),
    clamped_before_it_is_rounded: (rows(6, 256), rows(256)),
    fnuz: (rows(6, 256), rows(256)),
    static: (rows(6, 256), rows(256), ONE),
    static_divided: (rows(6, 256), rows(256), ONE),
    static_inverse: (rows(6, 256, dtype=torch.float32), rows(256, dtype=torch.float32), ONE[0]),
    add_static: (rows(6, 256), rows(6, 256), rows(256), ONE),
    add_per_group: (rows(2, 3, 256), rows(2, 3, 256), rows(256)),
}
spellings = pytest.mark.parametrize("fn", SPELLINGS, ids=lambda fn: fn.__name__)


def test_a_norm_and_its_quantisation_become_one_op():
    graph, report = rewritten(per_token, *SPELLINGS[per_token], dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, x: bf16[s0, 256], weight: bf16[256])
    rms_norm_quant = fixpass.rms_norm_quant(x, None, weight, None, None, 1e-06, norm_dtype=bf16, quant_dtype=float8_e4m3fn, apply='reciprocal', low=-448.0, high=448.0, scale_min=4.359654017857143e-06, limit=448.0)  (float8_e4m3fn[s0, 256], f32[s0, 1], bf16[0])
    getitem_1 = getitem(rms_norm_quant, 0)                                                                                                                                                                             float8_e4m3fn[s0, 256]
    getitem_2 = getitem(rms_norm_quant, 1)                                                                                                                                                                             f32[s0, 1]
    return getitem_1, getitem_2
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[s0, 256]
    applied rms_norm_quant: rms_norm of bf16[s0, 256] joined with its quantisation to float8_e4m3fn with a scale for each row
""",
    )


def test_the_residual_and_groups_of_a_row_are_joined_too():
    graph, report = rewritten(add_per_group, *SPELLINGS[add_per_group], dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, s1, x: bf16[s0, s1, 256], residual: bf16[s0, s1, 256], weight: bf16[256])
    rms_norm_quant = fixpass.rms_norm_quant(residual, x, weight, None, None, 1e-06, norm_dtype=bf16, quant_dtype=float8_e4m3fn, apply='divide', low=-448.0, high=448.0, limit=448.0, amax_min=1e-10, group_size=128)  (float8_e4m3fn[s0, s1, 256], f32[s0, s1, 2], bf16[s0, s1, 256])
    getitem_2 = getitem(rms_norm_quant, 0)                                                                                                                                                                            float8_e4m3fn[s0, s1, 256]
    getitem_3 = getitem(rms_norm_quant, 1)                                                                                                                                                                            f32[s0, s1, 2]
    getitem_4 = getitem(rms_norm_quant, 2)                                                                                                                                                                            bf16[s0, s1, 256]
    reshape = reshape(getitem_3, [-1, 2, 1])                                                                                                                                                                          f32[s1*s0, 2, 1]
    squeeze = squeeze.dim(reshape, -1)                                                                                                                                                                                f32[s1*s0, 2]
    return getitem_2, squeeze, getitem_4
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied add_rms_norm: became rms_norm of bf16[s0, s1, 256], add joined as add_rms_norm of bf16[s0, s1, 256]
    applied rms_norm_quant: add_rms_norm of bf16[s0, s1, 256] joined with its quantisation to float8_e4m3fn with a scale for each 128 values
""",
    )


@spellings
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_each_spelling_becomes_the_op_and_keeps_every_bit(fn, dynamic):
    """Through all passes for a CPU, where the op becomes ordinary operations again."""
    graph, _ = rewritten(fn, *SPELLINGS[fn], dynamic=dynamic)
    assert "fixpass.rms_norm_quant" in graph
    assert "abs" not in graph
    assert "clamp" not in graph
    torch._dynamo.reset()
    assert_equal(compiled(fn, dynamic=dynamic), fn)


def assert_equal(actual, fn):
    args = [rows(*arg.shape, dtype=arg.dtype) if arg.numel() > 1 else arg for arg in SPELLINGS[fn]]
    got, want = (
        each if isinstance(each, tuple) else (each,) for each in (actual(*args), fn(*args))
    )
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(bits(a), bits(b))


@pytest.mark.inductor
def test_inductor_makes_the_kernels_and_the_codes_that_it_makes_without_fixpass():
    args = (rows(6, 256), rows(6, 256), rows(256))
    results, counts = [], []
    for backend in ("fixpass", "inductor"):
        torch._dynamo.reset()
        metrics.reset()
        results.append(torch.compile(add_per_group, backend=backend)(*args))
        counts.append(metrics.generated_kernel_count)
    assert counts[0] == counts[1]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*results, strict=True))


@pytest.mark.full
@pytest.mark.inductor
def test_inductor_gives_the_codes_of_eager():
    """In fp32, where both round alike; a sum in another order is one code, near a tie."""
    x, weight = torch.randn(64, 256), torch.randn(256)
    torch._dynamo.reset()
    codes, scales = torch.compile(per_token, backend="fixpass")(x, weight)
    want, want_scales = per_token(x, weight)
    torch.testing.assert_close(scales, want_scales)
    assert (bits(codes).short() - bits(want)).abs().max() <= 1
    assert (bits(codes) != bits(want)).float().mean() < 1e-3


def bits(tensor):
    return tensor.view(torch.uint8)


def reason(fn, *args):
    """The reason why the quantisation stays, or the line of the op if it does not."""
    graph, report = rewritten(fn, *args)
    lines = [line for line in report.splitlines() if "missed" in line]
    return lines[0].split(": ", 1)[1] if lines else graph


def quantised(change):
    """A model that quantises a norm y as `change` says."""
    return lambda x, weight: change(llama(x, weight))


def row_scale(y, limit=448.0):
    return y.abs().amax(-1, keepdim=True).float() / limit


LEFT = {
    "no bounds": (
        lambda y: (y / row_scale(y)).to(E4M3FN),
        "values outside float8_e4m3fn are not clamped",
    ),
    "wide bounds": (
        lambda y: (y / row_scale(y)).clamp(-500, 500).to(E4M3FN),
        "clamped to -500 and 500, which float8_e4m3fn does not hold",
    ),
    "broken bounds": (
        lambda y: (y / row_scale(y)).clamp(-1.5, 1.5).round().to(torch.int8),
        "clamped to -1.5 and 1.5, which are no integers",
    ),
    "truncated": (
        lambda y: (y / row_scale(y)).clamp(-128, 127).to(torch.int8),
        "values are not rounded before they become int8",
    ),
    "rounded": (
        lambda y: (y / row_scale(y)).round().clamp(-448, 448).to(E4M3FN),
        "values are rounded before they become float8_e4m3fn",
    ),
    "scaled in bf16": (
        lambda y: (y / row_scale(y).bfloat16()).clamp(-448, 448).to(E4M3FN),
        "scaled in bf16, not in f32",
    ),
    "converted": (
        lambda y: (y / row_scale(y)).clamp(-448, 448).bfloat16().to(E4M3FN),
        "converted to bf16 before float8_e4m3fn",
    ),
    "another reader": (
        lambda y: ((y / row_scale(y)).clamp(-448, 448).to(E4M3FN), y),
        "rms_norm is also read by output",
    ),
    "amax kept": (
        lambda y: ((y / row_scale(y)).clamp(-448, 448).to(E4M3FN), y.abs().amax(-1)),
        "rms_norm is also read by abs_2",
    ),
    "scale of a column": (
        lambda y: (y / (y.abs().amax(0, keepdim=True).float() / 448)).clamp(-448, 448).to(E4M3FN),
        "the scale div is neither one f32 number nor amax / constant of a row",
    ),
    "scale of the tensor": (
        lambda y: (y.float() / (y.abs().amax().float() / 448)).clamp(-448, 448).to(E4M3FN),
        "the scale div is computed after the norm",
    ),
    "group over rows": (
        lambda y: (y.view(-1, 512) / row_scale(y.view(-1, 512))).clamp(-448, 448).to(E4M3FN),
        "the scale div is neither one f32 number nor amax / constant of a row",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stops_the_rewrite_is_said(name):
    change, why = LEFT[name]
    assert reason(quantised(change), bf16(6, 256), bf16(256)) == why


def test_a_scale_with_more_dimensions_than_the_norm_stops_it():
    args = (bf16(6, 256), bf16(256), torch.ones(1, 1, 1))
    assert reason(static, *args) == "the scale scale adds dimensions"


def test_a_norm_that_is_not_contiguous_stops_it():
    def transposed(x, weight):
        return static(x.transpose(0, 1), weight, ONE)

    x = bf16(2, 3, 256)
    assert reason(transposed, x, bf16(256)).endswith(
        "f32[3, 2, 256][256, 768, 1] is not contiguous"
    )


def test_a_norm_for_which_the_model_names_a_kernel_is_left():
    def named(x, weight):
        y = torch.ops.fixpass.rms_norm(x, weight, None, 1e-6, kernel_name="inductor")
        return (y / row_scale(y)).clamp(-448, 448).to(E4M3FN)

    why = "the model asks for inductor, which does not quantise"
    assert reason(named, bf16(6, 256), bf16(256)) == why


def test_a_conversion_behind_no_norm_gets_no_remark():
    def quantise(x):
        return (x / 3.0).clamp(-448, 448).to(E4M3FN)

    assert rewritten(quantise, f32(6, 256))[1].strip() == ""


EAGER = Target("eager", "cuda", ("strided_rms_norm_quant", "inductor"), prefers_fusion=False)


def test_at_equal_cost_inductor_is_chosen_and_fuses():
    passes = (CanonicalizeNorms(), SelectNormKernel(target_named("cuda:sm_90")))
    _, report = rewritten(per_token, bf16(6, 256), bf16(256), pipeline=Pipeline(passes))
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[6, 256]
    applied rms_norm_quant: rms_norm of bf16[6, 256] joined with its quantisation to float8_e4m3fn with a scale for each row
select-norm-kernel
    applied rms_norm_quant: inductor reads bf16[6, 256]; no copy; reads and writes 4,608 bytes in 1 launch (strided_rms_norm_quant: 4,608 bytes in 1 launch)
""",
    )


def test_without_inductor_our_kernel_reads_strided_rows_without_a_copy():
    def of_a_slice(packed, weight):
        return per_group(packed[:, 64:576], weight)

    passes = (CanonicalizeNorms(), SelectNormKernel(EAGER), InsertRelayout())
    pipeline = Pipeline(passes, verify=True, strict=True)
    graph, report = rewritten(of_a_slice, bf16(6, 640), bf16(512), pipeline=pipeline)
    assert "kernel_name='strided_rms_norm_quant'" in graph
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[6, 512][640, 1]
    applied rms_norm_quant: rms_norm of bf16[6, 512][640, 1] joined with its quantisation to float8_e4m3fn with a scale for each 128 values
select-norm-kernel
    applied rms_norm_quant: strided_rms_norm_quant reads bf16[6, 512][640, 1]; no copy; reads and writes 9,216 bytes in 1 launch (inductor: 9,216 bytes in 1 launch)
""",
    )

"""canonicalize-norms: which spellings of a norm become one op, and what stops the others."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from fixpass import Pipeline
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.testing import assert_same, bf16, f32, text, trace
from helpers.compiling import compiled
from helpers.spellings import cohere, gemma, llama, olmo, t5

PIPELINE = Pipeline((CanonicalizeNorms(),), verify=True, strict=True)


def rewritten(fn, *args, **kwargs):
    """The graph after the pass as text, and the report."""
    gm = trace(fn, *args, **kwargs)
    report = PIPELINE.run(gm.graph)
    return text(gm.graph), str(report)


def rewritten_op(fn, *args, **kwargs):
    """The line of the norm op alone, for spellings that differ in one detail."""
    graph, _ = rewritten(fn, *args, **kwargs)
    lines = [line.strip() for line in graph.splitlines() if "fixpass." in line]
    return " / ".join(" ".join(line.split()) for line in lines)


def llama_with_eps(x, weight, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def test_a_llama_norm_of_packed_heads_becomes_one_op():
    def q_norm(qkv, weight):
        return llama(qkv[:, :1024].view(-1, 8, 128), weight)

    graph, report = rewritten(q_norm, bf16(5, 3072), bf16(128), dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, s1, qkv: bf16[s0, s1], weight: bf16[128])
    slice_2 = slice.Tensor(qkv, 1, 0, 1024)                                  bf16[s0, 1024][s1, 1]
    view = view(slice_2, [-1, 8, 128])                                       bf16[s0, 8, 128][s1, 128, 1]
    rms_norm = fixpass.rms_norm(view, weight, None, 1e-06, norm_dtype=bf16)  bf16[s0, 8, 128]
    return rms_norm
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[s0, 8, 128][s1, 128, 1]
""",
    )


def test_dtypes_eps_and_order_of_casts_are_read_from_the_graph():
    x, w = bf16(2, 3, 64), bf16(64)
    found = "\n".join(
        rewritten_op(fn, x, w)
        for fn in (
            llama,
            gemma,
            t5,
            olmo,
            cohere,
            lambda x, w: llama_with_eps(x, w, 0.25),
            lambda x, w: F.rms_norm(x, (64,), w, 1e-6),
            lambda x, w: F.layer_norm(x, (64,), w, w, 1e-6),
            lambda x, w: llama(x.float(), w),
            lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            lambda x, w: F.rms_norm(x.double(), (64,), w.double(), 1e-6),
        )
    )
    assert_expected_inline(
        found + "\n",
        """\
rms_norm = fixpass.rms_norm(x, weight, None, 1e-06, norm_dtype=bf16) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, weight, None, 1e-06, weight_offset=1.0, weight_dtype=f32) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, weight, None, 1e-06, norm_dtype=bf16) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, weight, None, 1e-06) bf16[2, 3, 64]
layer_norm = fixpass.layer_norm(x, weight, None, 1e-05) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, w, None, 0.25, norm_dtype=bf16) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, w, None, 9.999999974752427e-07) bf16[2, 3, 64]
layer_norm = fixpass.layer_norm(x, w, w, 1e-06) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, out_dtype=f32) f32[2, 3, 64]
rms_norm = fixpass.rms_norm(x, None, None, 1e-06, compute_dtype=bf16) bf16[2, 3, 64]
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, compute_dtype=f64, out_dtype=f64) f64[2, 3, 64]
""",
    )


def test_every_spelling_of_the_root_is_read():
    w = f32(64)

    def rsqrt(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    def divided(x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

    def power(x):
        return w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5))

    def unsqueezed(x):
        return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).unsqueeze(-1) * w

    def reciprocal(x):
        return x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w

    for spelling in (rsqrt, divided, power, unsqueezed, reciprocal):
        assert "fixpass.rms_norm(x, w, None, 1e-06)" in rewritten_op(spelling, f32(4, 64)), spelling
        assert_same(compiled(spelling), spelling, f32(4, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [llama, gemma, t5, olmo, cohere])
def test_values_and_strides_are_those_of_eager(norm, dtype):
    qkv, weight = f32(5, 3072).to(dtype), f32(128).to(dtype)

    def heads(qkv, weight):
        return norm(qkv[:, :1024].view(-1, 8, 128), weight)

    assert_same(compiled(heads), heads, qkv, weight)
    assert_same(
        compiled(heads), heads, qkv.requires_grad_(), weight.requires_grad_(), gradients=True
    )


def test_a_permuted_input_keeps_its_strides():
    def permuted(x, weight):
        return llama(x.transpose(0, 1), weight)

    found = rewritten_op(permuted, bf16(4, 8, 64), bf16(64))
    assert_expected_inline(
        found,
        """rms_norm = fixpass.rms_norm(permute, weight, None, 1e-06, norm_dtype=bf16, order=[1, 0, 2]) bf16[8, 4, 64][64, 512, 1]""",
    )
    assert_same(compiled(permuted), permuted, bf16(4, 8, 64), bf16(64))


def test_a_residual_read_again_is_joined_with_the_norm():
    def block(x, residual, weight):
        total = residual + x
        return llama(total, weight), total

    graph, report = rewritten(block, bf16(2, 64), bf16(2, 64), bf16(64))
    assert_expected_inline(
        graph,
        """\
graph(residual: bf16[2, 64], x: bf16[2, 64], weight: bf16[64])
    add_rms_norm = fixpass.add_rms_norm(x, residual, weight, None, 1e-06, norm_dtype=bf16)  (bf16[2, 64], bf16[2, 64])
    getitem_1 = getitem(add_rms_norm, 0)                                                    bf16[2, 64]
    getitem = getitem(add_rms_norm, 1)                                                      bf16[2, 64]
    return getitem_1, getitem
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied add_rms_norm: became rms_norm of bf16[2, 64], add joined as add_rms_norm of bf16[2, 64]
""",
    )


def test_a_sum_that_only_the_norm_reads_stays_an_add():
    graph, _ = rewritten(lambda x, r, w: llama(x + r, w), bf16(2, 64), bf16(2, 64), bf16(64))
    assert "add.Tensor" in graph
    assert "fixpass.rms_norm" in graph


def test_a_broadcast_residual_is_missed_with_its_layouts():
    def block(x, residual, weight):
        total = x + residual
        return llama(total, weight), total

    _, report = rewritten(block, bf16(2, 64), bf16(64), bf16(64))
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[2, 64]
    missed  rms_norm: add broadcasts bf16[64] to bf16[2, 64]
""",
    )


def test_a_root_that_is_not_inverted_is_no_norm():
    def variance(x):
        return x.pow(2).mean(-1) + 1e-6

    def multiplied(x):
        return x * torch.sqrt(variance(x)).unsqueeze(-1)

    def inverted_twice(x):
        return x * torch.rsqrt(variance(x)).reciprocal().unsqueeze(-1)

    def divided_by_the_inverse(x):
        return x / torch.rsqrt(variance(x)).unsqueeze(-1)

    for spelling in (multiplied, inverted_twice, divided_by_the_inverse):
        assert rewritten_op(spelling, f32(4, 64)) == "", spelling
        assert_same(compiled(spelling), spelling, f32(4, 64))


def missed(fn, *args, **kwargs):
    """The reasons on the report, one line each."""
    gm = trace(fn, *args, **kwargs)
    return "".join(f"{r.text}\n" for r in PIPELINE.run(gm.graph).of_kind("missed"))


def test_each_near_miss_says_which_step_stopped_it():
    def two_dims(x):
        return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6)

    def scale_read_twice(x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * scale, scale

    def other_numerator(x):
        return x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def cubes(x):
        return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)

    def no_mean(x):
        return x * torch.rsqrt(x + 1e-6)

    def unbiased(x):
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)

    def eps_is_an_input(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.new_full((), 1e-6))

    def added(x):
        return x + torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    found = "".join(
        missed(fn, f32(2, 4, 64))
        for fn in (
            two_dims,
            scale_read_twice,
            other_numerator,
            cubes,
            no_mean,
            unbiased,
            eps_is_an_input,
            added,
        )
    )
    assert_expected_inline(
        found,
        """\
mean reduces dimensions [-2, -1] of 3, not the last alone
the scale is also a result of the graph (saved for the backward pass)
mul does not scale what was squared
pow_1 under the mean is not a square
x under the root is not a mean of squares
var is an unbiased variance
add adds no constant eps to the mean of squares
the scale goes to add_1, which is not a multiply of the input by it
""",
    )


def test_a_scale_kept_for_the_backward_pass_is_missed():
    x, w = f32(2, 64).requires_grad_(), nn.Parameter(f32(64))
    assert_expected_inline(
        missed(llama, x, w, training=True),
        """\
the scale is also a result of the graph (saved for the backward pass)
""",
    )

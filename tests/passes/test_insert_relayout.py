"""insert-relayout: the cheapest change that makes an opaque kernel's contract hold.

The kernels are aiter's and vLLM's through stand-ins that refuse a wrong layout as the real ones
would crash, so a relayout that is missing or undone fails here.
"""

import pytest
import torch
from expecttest import assert_expected_inline

import fixpass
from fixpass import Pipeline
from fixpass.lowering.target import Target
from fixpass.passes import default_passes
from fixpass.testing import assert_same, bf16, text, trace
from helpers import standins
from helpers.spellings import heads, llama

AITER = ("aiter_rms_norm", "aiter_add_rms_norm", "aiter_layer_norm")


@pytest.fixture(autouse=True)
def _libraries():
    standins.register()


def relayouts(kernels, fn, *args, **kwargs):
    gm = trace(fn, *args, **kwargs)
    passes = default_passes(Target("rocm:gfx942", "cuda", kernels))
    report = Pipeline(passes, verify=True, strict=True).run(gm.graph)
    remarks = report.of_pass("insert-relayout")
    return text(gm.graph), "".join(f"{remark}\n" for remark in remarks)


def compiled(fn, kernels=AITER, lower="eager"):
    options = {"lower": lower, "verify": True, "strict": True, "norm_kernels": kernels}
    return torch.compile(fn, backend="fixpass", options=options)


def test_strided_heads_are_copied_and_viewed_as_rows():
    graph, report = relayouts(AITER, heads, bf16(5, 3072), bf16(128), dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, s1, qkv: bf16[s0, s1], weight: bf16[128])
    slice_2 = slice.Tensor(qkv, 1, 0, 1024)                                                                     bf16[s0, 1024][s1, 1]
    view = view(slice_2, [-1, 8, 128])                                                                          bf16[s0, 8, 128][s1, 128, 1]
    clone = clone(view, memory_format=contiguous_format)                                                        bf16[s0, 8, 128]
    reshape = reshape(clone, [-1, 128])                                                                         bf16[8*s0, 128]
    rms_norm_1 = fixpass.rms_norm(reshape, weight, None, 1e-06, norm_dtype=bf16, kernel_name='aiter_rms_norm')  bf16[8*s0, 128]
    sym_size = sym_size.int(view, 0)                                                                            s0
    reshape_1 = reshape(rms_norm_1, [sym_size, 8, 128])                                                         bf16[s0, 8, 128]
    return reshape_1
""",
    )
    assert_expected_inline(
        report,
        """\
applied rms_norm_1: aiter_rms_norm: copy x, view as rows, which reads and writes 20,480 bytes
""",
    )


def test_dense_heads_are_only_viewed():
    graph, _ = relayouts(AITER, llama, bf16(5, 8, 128), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(x: bf16[5, 8, 128], weight: bf16[128])
    reshape = reshape(x, [-1, 128])                                                                             bf16[40, 128]
    rms_norm_1 = fixpass.rms_norm(reshape, weight, None, 1e-06, norm_dtype=bf16, kernel_name='aiter_rms_norm')  bf16[40, 128]
    reshape_1 = reshape(rms_norm_1, [5, 8, 128])                                                                bf16[5, 8, 128]
    return reshape_1
""",
    )


def test_dense_rows_are_left_alone():
    graph, report = relayouts(AITER, llama, bf16(5, 128), bf16(128))
    assert "clone" not in graph
    assert "reshape" not in graph
    assert report == ""


def test_only_the_operand_that_needs_it_is_copied():
    def block(qkv, residual, weight):
        total = qkv[:, :128] + residual
        return llama(total, weight), total

    graph, report = relayouts(AITER, block, bf16(5, 256), bf16(5, 128), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(qkv: bf16[5, 256], residual: bf16[5, 128], weight: bf16[128])
    slice_1 = slice.Tensor(qkv, 1, 0, 128)                                                                                          bf16[5, 128][256, 1]
    clone = clone(slice_1, memory_format=contiguous_format)                                                                         bf16[5, 128]
    add_rms_norm_1 = fixpass.add_rms_norm(clone, residual, weight, None, 1e-06, norm_dtype=bf16, kernel_name='aiter_add_rms_norm')  (bf16[5, 128], bf16[5, 128])
    getitem_2 = getitem(add_rms_norm_1, 1)                                                                                          bf16[5, 128]
    getitem_3 = getitem(add_rms_norm_1, 0)                                                                                          bf16[5, 128]
    return getitem_3, getitem_2
""",
    )
    assert_expected_inline(
        report,
        """\
applied add_rms_norm_1: aiter_add_rms_norm: copy x, which reads and writes 2,560 bytes
""",
    )


def test_a_permuted_result_is_given_back_with_its_strides():
    def permuted(x, weight):
        return llama(x.transpose(0, 1), weight)

    graph, _ = relayouts(AITER, permuted, bf16(4, 8, 128), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(x: bf16[4, 8, 128], weight: bf16[128])
    permute = permute(x, [1, 0, 2])                                                                             bf16[8, 4, 128][128, 1024, 1]
    clone = clone(permute, memory_format=contiguous_format)                                                     bf16[8, 4, 128]
    reshape = reshape(clone, [-1, 128])                                                                         bf16[32, 128]
    rms_norm_1 = fixpass.rms_norm(reshape, weight, None, 1e-06, norm_dtype=bf16, kernel_name='aiter_rms_norm')  bf16[32, 128]
    reshape_1 = reshape(rms_norm_1, [8, 4, 128])                                                                bf16[8, 4, 128]
    permute_1 = permute(reshape_1, [1, 0, 2])                                                                   bf16[4, 8, 128][128, 512, 1]
    clone_1 = clone(permute_1, memory_format=contiguous_format)                                                 bf16[4, 8, 128]
    permute_2 = permute(clone_1, [1, 0, 2])                                                                     bf16[8, 4, 128][128, 1024, 1]
    return permute_2
""",
    )


def test_the_kernel_fails_on_what_the_model_gives_it_and_not_behind_the_pass():
    qkv, weight = bf16(5, 3072), bf16(128)
    with pytest.raises(standins.LayoutFault, match="is not dense 2-D"):
        torch.ops.aiter.rms_norm(qkv[:, :1024].view(-1, 8, 128), weight, 1e-6)
    assert_same(compiled(heads), heads, qkv, weight)


def post_residual(x, residual, more, weight):
    """SGLang's `post_residual_addition`: the residual grows before it is added."""
    residual = residual + more
    total = x + residual
    return llama(total, weight), total


CASES = {
    "packed heads": (heads, lambda: (bf16(5, 3072), bf16(128))),
    "transposed": (lambda x, w: llama(x.transpose(0, 1), w), lambda: (bf16(4, 8, 128), bf16(128))),
    "4-D": (lambda x, w: llama(x[:, ::2], w), lambda: (bf16(2, 6, 4, 128), bf16(128))),
    "strided last dim": (lambda x, w: llama(x[:, ::2], w), lambda: (bf16(6, 256), bf16(128))),
    "expanded": (lambda x, w: llama(x.expand(5, 128), w), lambda: (bf16(1, 128), bf16(128))),
    "one row": (llama, lambda: (bf16(128), bf16(128))),
    "empty": (llama, lambda: (bf16(0, 128), bf16(128))),
    "3-D residual": (
        lambda x, r, w: post_residual(x, r, r, w),
        lambda: (bf16(2, 5, 256)[..., :128], bf16(2, 5, 128), bf16(128)),
    ),
    "strided residual": (
        lambda x, r, w: post_residual(x, r[..., 128:], r[..., :128], w),
        lambda: (bf16(5, 128), bf16(5, 256), bf16(128)),
    ),
    "transposed residual": (
        lambda x, r, w: post_residual(x, r.transpose(0, 1), x, w),
        lambda: (bf16(3, 4, 128), bf16(4, 3, 128), bf16(128)),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_strides_are_those_of_eager(case, dynamic):
    fn, inputs = CASES[case]
    options = {"lower": "eager", "verify": True, "strict": True, "norm_kernels": AITER}
    run = torch.compile(fn, backend="fixpass", options=options, dynamic=dynamic)
    assert_same(run, fn, *inputs(), rtol=0.016, atol=1e-5)


def test_without_fuel_for_the_relayout_the_kernel_is_not_called():
    args = bf16(5, 3072), bf16(128)
    for fuel in range(5):
        options = {"lower": "eager", "norm_kernels": AITER, "fuel": fuel, "strict": True}
        torch._dynamo.reset()
        assert_same(torch.compile(heads, backend="fixpass", options=options), heads, *args)


def test_an_order_of_kernels_given_by_the_user_is_kept_to():
    """A pointwise producer would fuse; that is no reason to overrule the user."""
    fn, inputs = CASES["strided residual"]
    compiled(fn)(*inputs())
    chosen = fixpass.last_reports()[-1].of_pass("select-norm-kernel")[-1]
    assert chosen.text.startswith("aiter_add_rms_norm reads")


@pytest.mark.inductor
def test_inductor_keeps_the_layouts_that_the_pass_made():
    assert_same(compiled(heads, lower="inductor"), heads, bf16(5, 3072), bf16(128))
    block = CASES["strided residual"]
    assert_same(compiled(block[0], lower="inductor"), block[0], *block[1](), rtol=0.016, atol=1e-5)

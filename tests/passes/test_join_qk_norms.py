"""join-qk-norms: q and k of one packed projection in one launch, where our kernel computes both."""

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.lowering.target import Target, target_named
from fixpass.passes import default_passes
from fixpass.testing import bf16, text, trace
from helpers.spellings import llama as norm

CUDA = target_named("cuda:sm_90")


def heads(qkv, start, stop):
    return qkv[:, start:stop].view(-1, (stop - start) // 128, 128)


def scores(q, k):
    return q @ k.transpose(1, 2)


def attention(qkv, q_weight, k_weight):
    q = norm(heads(qkv, 0, 512), q_weight).transpose(0, 1)
    k = norm(heads(qkv, 512, 768), k_weight).transpose(0, 1)
    return scores(q[:2], k)


def join(target, fn, *args, **kwargs):
    gm = trace(fn, *args, **kwargs)
    report = Pipeline(default_passes(target), verify=True, strict=True).run(gm.graph)
    remarks = report.of_pass("join-qk-norms")
    return gm, "".join(f"{remark}\n" for remark in remarks)


INPUTS = (bf16(5, 1024), bf16(128), bf16(128))


def test_q_and_k_of_a_packed_tensor_become_one_launch():
    gm, report = join(CUDA, attention, *INPUTS, dynamic=True)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(s0, s1, qkv: bf16[s0, s1], q_weight: bf16[128], k_weight: bf16[128])
    slice_2 = slice.Tensor(qkv, 1, 0, 512)                                                                              bf16[s0, 512][s1, 1]
    view = view(slice_2, [-1, 4, 128])                                                                                  bf16[s0, 4, 128][s1, 128, 1]
    slice_6 = slice.Tensor(qkv, 1, 512, 768)                                                                            bf16[s0, 256][s1, 1]
    view_2 = view(slice_6, [-1, 2, 128])                                                                                bf16[s0, 2, 128][s1, 128, 1]
    qk_norm = fixpass.qk_norm(view, view_2, q_weight, k_weight, 1e-06, norm_dtype=bf16, kernel_name='strided_qk_norm')  (bf16[s0, 4, 128], bf16[s0, 2, 128])
    getitem_1 = getitem(qk_norm, 0)                                                                                     bf16[s0, 4, 128]
    getitem = getitem(qk_norm, 1)                                                                                       bf16[s0, 2, 128]
    permute = permute(getitem_1, [1, 0, 2])                                                                             bf16[4, s0, 128][128, 512, 1]
    permute_1 = permute(getitem, [1, 0, 2])                                                                             bf16[2, s0, 128][128, 256, 1]
    slice_5 = slice.Tensor(permute, 0, 0, 2)                                                                            bf16[2, s0, 128][128, 512, 1]
    permute_2 = permute(permute_1, [0, 2, 1])                                                                           bf16[2, 128, s0][128, 1, 256]
    expand = expand(slice_5, [2, s0, 128])                                                                             bf16[2, s0, 128][128, 512, 1]
    expand_1 = expand(permute_2, [2, 128, s0])                                                                         bf16[2, 128, s0][128, 1, 256]
    bmm = bmm(expand, expand_1)                                                                                         bf16[2, s0, s0]
    return bmm
""",
    )
    assert_expected_inline(
        report,
        """\
applied qk_norm: rms_norm and rms_norm_1 of bf16[s30, 4, 128][s95, 128, 1] and bf16[s30, 2, 128][s95, 128, 1] became one launch
""",
    )


def test_values_are_those_of_two_norms():
    gm, _ = join(CUDA, attention, *INPUTS)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fixpass.qk_norm.default):
        node.update_kwarg("kernel_name", "inductor")
    gm.recompile()
    torch.testing.assert_close(gm(*INPUTS)[0], attention(*INPUTS), rtol=0, atol=0)


def test_nothing_is_joined_where_inductor_compiles_the_norms():
    def with_rope(qkv, q_weight, k_weight, cos):
        q = norm(heads(qkv, 0, 512), q_weight) * cos
        k = norm(heads(qkv, 512, 768), k_weight) * cos
        return scores(q.transpose(0, 1)[:2], k.transpose(0, 1))

    _, report = join(CUDA, with_rope, *INPUTS, bf16(128))
    assert report == ""


@pytest.mark.parametrize("change", ["eps", "tensor", "rounding"])
def test_norms_that_differ_are_not_joined(change):
    def differ(qkv, q_weight, k_weight):
        other = qkv + 1 if change == "tensor" else qkv
        q = norm(heads(qkv, 0, 512), q_weight).transpose(0, 1)
        k = heads(other, 512, 768)
        if change == "tensor":
            k = norm(k, k_weight)
        else:
            eps = 1e-5 if change == "eps" else 1e-6
            weight = None if change == "eps" else k_weight
            k = torch.nn.functional.rms_norm(k, (128,), weight, eps)
        return scores(q[:2], k.transpose(0, 1))

    gm, _ = join(CUDA, differ, *INPUTS)
    assert "qk_norm" not in text(gm.graph)


def test_a_weight_that_comes_too_late_is_missed_with_its_name():
    def late(qkv, q_weight, k_weight):
        q = norm(heads(qkv, 0, 512), q_weight)
        k_weight = k_weight + q.sum()
        k = norm(heads(qkv, 512, 768), k_weight)
        return scores(q.transpose(0, 1)[:2], k.transpose(0, 1))

    _, report = join(CUDA, late, *INPUTS)
    assert_expected_inline(
        report,
        """\
missed  rms_norm: not joined with rms_norm_1: add_1 is computed after rms_norm
""",
    )


def test_a_target_without_the_kernel_joins_nothing():
    gm, _ = join(Target("cuda", "cuda", ("strided_rms_norm", "inductor")), attention, *INPUTS)
    assert "qk_norm" not in text(gm.graph)

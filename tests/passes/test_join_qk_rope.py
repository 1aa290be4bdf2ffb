"""join-qk-rope: the norms of q and k and their rotations, as one op where our kernel computes it."""

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.lowering.target import CPU, Target, target_named
from fixpass.passes import default_passes
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.join_qk_rope import JoinQkRope
from fixpass.testing import bf16, text, trace
from helpers.rotary_spellings import SPELLINGS, neox, rotate_half
from helpers.spellings import llama as norm

CUDA = target_named("cuda:sm_90")
OP = torch.ops.fixpass.qk_norm_rope.default


def attention(rope=neox, k_rope=None):
    def forward(qkv, q_weight, k_weight, cos, sin):
        q = norm(qkv[..., :512].unflatten(-1, (4, 128)), q_weight).transpose(1, 2)
        k = norm(qkv[..., 512:768].unflatten(-1, (2, 128)), k_weight).transpose(1, 2)
        cos, sin = cos[:, None], sin[:, None]
        return rope(q, cos, sin), (k_rope or rope)(k, cos, sin)

    return forward


def inputs(width=128, dtype=torch.bfloat16):
    return (
        *(bf16(*shape) for shape in ((2, 5, 1024), (128,), (128,))),
        *(torch.randn(1, 5, width).to(dtype) for _ in range(2)),
    )


def joined(fn, *args, target=CUDA, **kwargs):
    gm = trace(fn, *args, **kwargs)
    steps = (CanonicalizeNorms(), JoinQkRope(target))
    report = Pipeline(steps, verify=True, strict=True).run(gm.graph)
    gm.recompile()
    return gm, "".join(f"{remark}\n" for remark in report.of_pass("join-qk-rope"))


def ops(gm):
    return gm.graph.find_nodes(op="call_function", target=OP)


def test_q_and_k_of_a_packed_tensor_become_one_op():
    gm, report = joined(attention(), *inputs(), dynamic=True)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(s0, s1, s2, qkv: bf16[s0, s1, s2], q_weight: bf16[128], k_weight: bf16[128], cos: bf16[1, s1, 128], sin: bf16[1, s1, 128])
    slice_1 = slice.Tensor(qkv, 2, 0, 512)                                                                                               bf16[s0, s1, 512][s2*s1, s2, 1]
    view = view(slice_1, [s0, s1, 4, 128])                                                                                             bf16[s0, s1, 4, 128][s2*s1, s2, 128, 1]
    slice_2 = slice.Tensor(qkv, 2, 512, 768)                                                                                             bf16[s0, s1, 256][s2*s1, s2, 1]
    view_1 = view(slice_2, [s0, s1, 2, 128])                                                                                           bf16[s0, s1, 2, 128][s2*s1, s2, 128, 1]
    unsqueeze = unsqueeze(cos, 1)                                                                                                        bf16[1, 1, s1, 128]
    unsqueeze_1 = unsqueeze(sin, 1)                                                                                                      bf16[1, 1, s1, 128]
    permute_2 = permute(unsqueeze, [0, 2, 1, 3])                                                                                         bf16[1, s1, 1, 128]
    permute_3 = permute(unsqueeze_1, [0, 2, 1, 3])                                                                                       bf16[1, s1, 1, 128]
    qk_norm_rope = fixpass.qk_norm_rope(view, view_1, q_weight, k_weight, permute_2, permute_3, 1e-06, norm_dtype=bf16, rotary_dim=128)  (bf16[s0, s1, 4, 128], bf16[s0, s1, 2, 128])
    getitem_4 = getitem(qk_norm_rope, 0)                                                                                                 bf16[s0, s1, 4, 128]
    getitem_5 = getitem(qk_norm_rope, 1)                                                                                                 bf16[s0, s1, 2, 128]
    permute_4 = permute(getitem_4, [0, 2, 1, 3])                                                                                         bf16[s0, 4, s1, 128][512*s1, 128, 512, 1]
    permute_5 = permute(getitem_5, [0, 2, 1, 3])                                                                                         bf16[s0, 2, s1, 128][256*s1, 128, 256, 1]
    return permute_4, permute_5
""",
    )
    assert_expected_inline(
        report,
        """\
applied qk_norm_rope: rms_norm and rms_norm_1 of bf16[s30, s95, 4, 128][s68*s95, s68, 128, 1] and bf16[s30, s95, 2, 128][s68*s95, s68, 128, 1] joined with their rotations: 128 values of each head, in NeoX pairs
""",
    )


@pytest.mark.parametrize("rope", SPELLINGS, ids=lambda rope: rope.__name__)
def test_each_spelling_becomes_the_op_with_the_same_values(rope):
    args = inputs(*SPELLINGS[rope])
    gm, _ = joined(attention(rope), *args)
    assert len(ops(gm)) == 1
    for got, want in zip(gm(*args), attention(rope)(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got.stride() == want.stride()


def test_a_norm_over_all_heads_is_rotated_head_by_head():
    def olmo(q, q_weight, k, k_weight, cos, sin):
        q = norm(q, q_weight).view(2, 5, 4, 128).transpose(1, 2)
        k = norm(k, k_weight).view(2, 5, 2, 128).transpose(1, 2)
        return neox(q, cos, sin), neox(k, cos, sin)

    tables = [torch.randn(1, 1, 5, 128) for _ in range(2)]
    args = (bf16(2, 5, 512), bf16(512), bf16(2, 5, 256), bf16(256), *tables)
    gm, _ = joined(olmo, *args)
    (op,) = ops(gm)
    assert op.kwargs["head_size"] == 128
    for got, want in zip(gm(*args), olmo(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_op_is_one_launch_where_inductor_takes_two():
    gm = trace(attention(), *inputs())
    report = Pipeline(default_passes(CUDA), verify=True, strict=True).run(gm.graph)
    remarks = report.of_pass("select-norm-kernel")
    assert_expected_inline(
        "".join(f"{remark}\n" for remark in remarks),
        """\
applied qk_norm_rope: strided_qk_norm_rope reads bf16[2, 5, 4, 128][5120, 1024, 128, 1]; no copy; reads and writes 33,280 bytes in 1 launch (inductor: 33,280 bytes in 2 launches)
""",
    )


@pytest.mark.parametrize(
    "target", [CPU, Target("cuda", "cuda", ("strided_rms_norm", "inductor"))], ids=["cpu", "other"]
)
def test_a_target_without_the_kernel_keeps_its_graph(target):
    args = inputs()
    gm = trace(attention(), *args)
    Pipeline((CanonicalizeNorms(),)).run(gm.graph)
    before = text(gm.graph)
    assert Pipeline((JoinQkRope(target),)).run(gm.graph).remarks == ()
    assert text(gm.graph) == before


def wrong_sign(x, cos, sin):
    return x * cos - rotate_half(x) * sin


def swapped(x, cos, sin):
    return neox(x, sin, cos)


def sum_in_other_dtype(x, cos, sin):
    return neox(x, cos, sin.float())


def read_twice(x, cos, sin):
    return neox(x, cos, sin) + x.sum()


def test_what_is_no_rotation_is_missed():
    _, report = joined(attention(wrong_sign), *inputs())
    assert_expected_inline(
        report,
        """\
missed  rms_norm: its columns are no pairs of a rotation in the end
missed  rms_norm_1: its columns are no pairs of a rotation in the end
""",
    )


def half_of_wide_tables(x, cos, sin):
    """One half of the tables serves both elements of a pair, and the other half nothing."""
    a, b = x.chunk(2, -1)
    y, z = x * cos, torch.cat((b, a), -1) * sin
    v, w = torch.cat((b, a), -1) * cos, x * sin
    return torch.cat((y[..., :64] - z[..., :64], v[..., :64] + w[..., :64]), -1)


def part_of_wide_tables(x, cos, sin):
    y = x * cos + torch.cat((-x[..., 32:64], x[..., :96]), -1) * sin
    return torch.cat((y[..., :64], x[..., 64:]), -1)


def pieces_that_do_not_fit(x, cos, sin):
    e = x[..., :64]
    pairs = torch.stack((-e[..., 1::2], e[..., ::2]), -1).flatten(-2)
    return torch.cat((pairs * sin[..., :64], x[..., 64:]), -1) + x * cos


@pytest.mark.parametrize("rope", [half_of_wide_tables, part_of_wide_tables, pieces_that_do_not_fit])
def test_columns_that_the_op_would_read_elsewhere_are_missed(rope):
    gm, report = joined(attention(rope), *inputs())
    assert not ops(gm)
    assert report.count("its columns are no pairs of a rotation in the end") == 2


def test_a_split_at_a_symbol_is_left_alone():
    def split(x, cos, sin):
        rotated, kept = x.split(cos.shape[-1], -1)
        return torch.cat((neox(rotated, cos, sin), kept), -1)

    gm, _ = joined(attention(split), *inputs(64), dynamic=True)
    assert not ops(gm)


def test_a_rotation_in_float64_is_not_given_to_our_kernel():
    def wide(x, cos, sin):
        return neox(x.double(), cos, sin).to(x.dtype)

    gm = trace(attention(wide), *inputs())
    report = Pipeline(default_passes(CUDA), verify=True, strict=True).run(gm.graph)
    assert "qk_norm_rope: inductor reads" in str(report)


def test_a_head_that_is_read_before_its_rotation_is_missed():
    _, report = joined(attention(read_twice), *inputs())
    assert_expected_inline(
        report,
        """\
missed  rms_norm: its heads are also read before the rotation, by sum_1
missed  rms_norm_1: its heads are also read before the rotation, by sum_2
""",
    )


def test_tables_of_two_dtypes_are_missed():
    _, report = joined(attention(sum_in_other_dtype), *inputs())
    assert_expected_inline(
        report,
        """\
missed  rms_norm: its columns are no pairs of a rotation in the end
missed  rms_norm_1: its columns are no pairs of a rotation in the end
""",
    )


def test_other_tables_for_k_are_missed():
    _, report = joined(attention(neox, swapped), *inputs())
    assert_expected_inline(
        report,
        """\
missed  rms_norm: not joined with rms_norm_1: other tables rotate it
missed  rms_norm_1: the same cos and sin rotate no other norm
""",
    )


def test_a_weight_that_comes_too_late_is_missed_with_its_name():
    def late(qkv, q_weight, k_weight, cos, sin):
        q = neox(norm(qkv[..., :512].unflatten(-1, (4, 128)), q_weight), cos, sin)
        k_weight = k_weight + q.sum()
        return q, neox(norm(qkv[..., 512:768].unflatten(-1, (2, 128)), k_weight), cos, sin)

    gm, report = joined(late, *inputs()[:3], bf16(5, 1, 128), bf16(5, 1, 128))
    assert not ops(gm)
    assert_expected_inline(
        report,
        """\
missed  rms_norm: not joined with rms_norm_1: add_2 is computed after add_1
missed  rms_norm_1: the same cos and sin rotate no other norm
""",
    )


def test_a_layer_norm_is_missed():
    def forward(q, cos, sin):
        return neox(torch.nn.functional.layer_norm(q, (128,)), cos, sin)

    _, report = joined(forward, bf16(2, 4, 128), bf16(128), bf16(128))
    assert_expected_inline(
        report,
        """\
missed  layer_norm: a layer norm is rotated, and the op has RMS norms
""",
    )

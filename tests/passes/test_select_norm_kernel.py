"""select-norm-kernel: which kernel each norm gets, and why the others do not."""

import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.lowering.target import CPU, Target, target_named
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.testing import bf16, f32, text, trace
from helpers.spellings import heads, llama

ROCM = target_named("rocm:gfx942")
CUDA = target_named("cuda:sm_90")


def select(target, fn, *args, **kwargs):
    """The graph and what select-norm-kernel says of it."""
    gm = trace(fn, *args, **kwargs)
    pipeline = Pipeline((CanonicalizeNorms(), SelectNormKernel(target)), verify=True, strict=True)
    remarks = pipeline.run(gm.graph).of_pass("select-norm-kernel")
    return text(gm.graph), "".join(f"{remark}\n" for remark in remarks)


def test_heads_of_a_packed_qkv_go_to_a_kernel_that_reads_strides():
    graph, report = select(ROCM, heads, bf16(5, 3072), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(qkv: bf16[5, 3072], weight: bf16[128])
    slice_1 = slice.Tensor(qkv, 1, 0, 1024)                                                          bf16[5, 1024][3072, 1]
    view = view(slice_1, [-1, 8, 128])                                                               bf16[5, 8, 128][3072, 128, 1]
    rms_norm = fixpass.rms_norm(view, weight, None, 1e-06, norm_dtype=bf16, kernel_name='inductor')  bf16[5, 8, 128]
    return rms_norm
""",
    )
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 8, 128][3072, 128, 1]; a copy would move 20,480 bytes
applied rms_norm: inductor reads bf16[5, 8, 128][3072, 128, 1]; no copy; reads and writes 20,480 bytes in 1 launch (strided_rms_norm: 20,480 bytes in 1 launch)
""",
    )


def test_symbolic_strides_are_refused_where_nothing_proves_them():
    _, report = select(ROCM, heads, bf16(5, 3072), bf16(128), dynamic=True)
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x is dense 2-D does not hold for bf16[s30, 8, 128][s95, 128, 1]; a copy would move 20,480 bytes
applied rms_norm: inductor reads bf16[s30, 8, 128][s95, 128, 1]; no copy; reads and writes 20,480 bytes in 1 launch (strided_rms_norm: 20,480 bytes in 1 launch)
""",
    )


def test_dense_rows_of_any_rank_reach_aiter_through_a_view():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(bf16(128))

        def forward(self, x):
            return llama(x.view(-1, 5, 128), self.weight)

    _, report = select(ROCM, Norm(), bf16(2, 640), dynamic=True)
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: hidden_size is even is not proved for bf16[s77, 5, (s27//5)]; no relayout would help
applied rms_norm: inductor reads bf16[s77, 5, (s27//5)]; no copy; reads and writes 5,120 bytes in 1 launch
""",
    )


def test_the_stride_of_a_size_1_dimension_means_nothing():
    x = bf16(64, 1, 128).as_strided((64, 1, 128), (128, 4194304, 1))
    _, report = select(ROCM, llama, x, bf16(128))
    assert_expected_inline(
        report,
        """\
applied rms_norm: aiter_rms_norm reads bf16[64, 1, 128]; no copy; view as rows; reads and writes 32,768 bytes in 1 launch (inductor: 32,768 bytes in 1 launch)
""",
    )


def test_our_kernel_and_inductor_read_any_layout_at_the_same_cost():
    reports = [select(t, heads, bf16(5, 3072), bf16(128))[1] for t in (CUDA, CPU)]
    assert_expected_inline(
        "".join(reports),
        """\
applied rms_norm: inductor reads bf16[5, 8, 128][3072, 128, 1]; no copy; reads and writes 20,480 bytes in 1 launch (strided_rms_norm: 20,480 bytes in 1 launch)
applied rms_norm: inductor reads bf16[5, 8, 128][3072, 128, 1]; no copy; reads and writes 20,480 bytes in 1 launch
""",
    )


def test_a_copy_is_charged_where_only_a_dense_kernel_is_left():
    only_aiter = Target("rocm:gfx942", "cuda", ("aiter_rms_norm",))
    _, report = select(only_aiter, heads, bf16(5, 3072), bf16(128))
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 8, 128][3072, 128, 1]; a copy would move 20,480 bytes
applied rms_norm: aiter_rms_norm reads bf16[5, 8, 128][3072, 128, 1]; copy x, view as rows; reads and writes 40,960 bytes in 2 launches
""",
    )


def test_a_site_that_no_kernel_takes_goes_to_inductor():
    only_aiter = Target("rocm:gfx942", "cuda", ("aiter_rms_norm",))
    _, report = select(only_aiter, heads, f32(5, 3072), f32(128))
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x.dtype in (f16, bf16) does not hold for f32[5, 8, 128][3072, 128, 1]; no relayout would help
applied rms_norm: inductor reads f32[5, 8, 128][3072, 128, 1]; no copy; reads and writes 40,960 bytes in 1 launch
""",
    )


def test_a_copy_in_front_of_the_norm_counts_as_avoidable():
    def copied(qkv, weight):
        return llama(qkv[:, :1024].view(-1, 8, 128).contiguous().view(-1, 128), weight)

    _, report = select(ROCM, copied, bf16(5, 3072), bf16(128))
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 8, 128][3072, 128, 1]; a copy would move 20,480 bytes
applied rms_norm: inductor reads bf16[5, 8, 128][3072, 128, 1]; no copy; reads and writes 20,480 bytes in 1 launch (strided_rms_norm: 20,480 bytes in 1 launch)
""",
    )


def test_a_residual_is_checked_as_x_is():
    def block(qkv, residual, weight):
        total = qkv[:, :128] + residual
        return llama(total, weight), total

    _, report = select(ROCM, block, bf16(5, 256), bf16(5, 128), bf16(128))
    assert_expected_inline(
        report,
        """\
missed  add_rms_norm: aiter_add_rms_norm: x is dense 2-D does not hold for bf16[5, 128][256, 1]; a copy would move 2,560 bytes
applied add_rms_norm: inductor reads bf16[5, 128][256, 1]; no copy; reads and writes 3,840 bytes in 1 launch (strided_add_rms_norm: 3,840 bytes in 1 launch)
""",
    )


def test_a_kernel_that_overwrites_its_operands_is_charged_for_their_copies():
    def block(x, residual, weight):
        total = x + residual
        return llama(total, weight), total

    target = Target("cuda:sm_90", "cuda", ("vllm_add_rms_norm", "inductor"))
    _, report = select(target, block, bf16(5, 128), bf16(5, 128), bf16(128))
    assert_expected_inline(
        report,
        """\
applied add_rms_norm: inductor reads bf16[5, 128]; no copy; reads and writes 3,840 bytes in 1 launch (vllm_add_rms_norm: 8,960 bytes in 3 launches)
""",
    )


def test_an_empty_batch_never_reaches_a_kernel_that_cannot_take_it():
    _, report = select(
        Target("rocm:gfx942", "cuda", ("aiter_rms_norm",)), llama, bf16(0, 128), bf16(128)
    )
    assert_expected_inline(
        report,
        """\
missed  rms_norm: aiter_rms_norm: x is not empty does not hold for bf16[0, 128]; no relayout would help
applied rms_norm: inductor reads bf16[0, 128]; no copy; reads and writes 0 bytes in 1 launch
""",
    )

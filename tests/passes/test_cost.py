"""Fusion: when Inductor's code moves fewer bytes than a kernel in the norm's place."""

import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.lowering.target import Target, target_named
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.testing import bf16, trace
from helpers.spellings import llama as norm

OURS = Target("cuda:sm_90", "cuda", ("strided_rms_norm", "inductor"))


def choice(fn, *args, target=OURS):
    gm = trace(fn, *args)
    pipeline = Pipeline((CanonicalizeNorms(), SelectNormKernel(target)), verify=True, strict=True)
    report = pipeline.run(gm.graph)
    (remark,) = [r for r in report.of_pass("select-norm-kernel") if r.kind == "applied"]
    return f"{remark.text}; saves {remark.bytes_saved:,}\n"


X, W, M = bf16(64, 128), bf16(128), bf16(128, 128)
SIZE = 64 * 128 * 2


def test_between_matmuls_the_first_kernel_is_chosen():
    assert_expected_inline(
        choice(lambda x, w, m: norm(x @ m, w) @ m, X, W, M),
        """\
strided_rms_norm reads bf16[64, 128]; no copy; reads and writes 32,768 bytes in 1 launch (inductor: 32,768 bytes in 1 launch); saves 0
""",
    )


def test_on_cuda_inductor_wins_where_neither_moves_less():
    assert_expected_inline(
        choice(lambda x, w, m: norm(x @ m, w) @ m, X, W, M, target=target_named("cuda:sm_90")),
        """\
inductor reads bf16[64, 128]; no copy; reads and writes 32,768 bytes in 1 launch (strided_rms_norm: 32,768 bytes in 1 launch); saves 0
""",
    )


def test_a_quantised_result_fuses_and_is_never_written():
    def quantised(x, w, m):
        return (norm(x @ m, w) * 3).clamp(-448, 448).to(torch.float8_e4m3fn)

    assert_expected_inline(
        choice(quantised, X, W, M),
        """\
inductor reads bf16[64, 128]; no copy; fused with mul_2; reads and writes 16,384 bytes in 1 launch (strided_rms_norm: 49,152 bytes in 1 launch); saves 32,768
""",
    )


def test_a_result_that_a_matmul_reads_too_is_written_all_the_same():
    def both(x, w, m):
        y = norm(x @ m, w)
        return y @ m, y * 2

    assert_expected_inline(
        choice(both, X, W, M),
        """\
inductor reads bf16[64, 128]; no copy; fused with mul_2; reads and writes 32,768 bytes in 1 launch (strided_rms_norm: 49,152 bytes in 1 launch); saves 16,384
""",
    )


def test_a_pointwise_producer_fuses():
    assert_expected_inline(
        choice(lambda x, w, m: norm(x.sin(), w) @ m, X, W, M),
        """\
inductor reads bf16[64, 128]; no copy; fused with sin; reads and writes 16,384 bytes in 1 launch (strided_rms_norm: 49,152 bytes in 1 launch); saves 32,768
""",
    )


def test_rope_behind_views_fuses():
    def rope(x, w, cos):
        y = norm(x.view(64, 2, 64), w[:64]).transpose(0, 1)
        turned = torch.cat([-y[..., 32:], y[..., :32]], dim=-1)
        return y * cos + turned * cos

    assert "fused with" in choice(rope, X, W, bf16(64))


def test_a_reader_that_waits_for_a_matmul_of_the_norm_does_not_fuse():
    def post_norm(x, w, m):
        y = norm(x @ m, w)
        return y + y @ m

    assert "strided_rms_norm reads" in choice(post_norm, X, W, M)


def test_a_copy_in_front_is_no_producer():
    def copied(x, w, m):
        return norm((x @ m).t().contiguous(), w[:64]) @ m[:64]

    assert "strided_rms_norm reads" in choice(copied, X, W, M)

"""canonicalize-norms: norm ops of engines and kernel libraries, through stand-ins."""

import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.canonicalize_norms.opaque import read_opaque
from fixpass.runtime.opaque_norms import OPAQUE_NORMS
from fixpass.testing import assert_same, bf16, text, trace
from helpers import standins
from helpers.compiling import compiled

PIPELINE = Pipeline((CanonicalizeNorms(),), verify=True, strict=True)


def rewritten_op(fn, *args):
    """The line of the norm op alone."""
    gm = trace(fn, *args)
    PIPELINE.run(gm.graph)
    lines = [line for line in text(gm.graph).splitlines() if "fixpass." in line]
    return " / ".join(" ".join(line.split()) for line in lines)


def test_every_foreign_op_becomes_ours():
    standins.register()
    x, r, w = bf16(4, 64), bf16(4, 64), bf16(64)

    def pair(results):
        return results[0], results[1]

    def written(op):
        def run(x, w):
            out = torch.empty_like(x)
            op(out, x, w, 1e-6, False)
            return out

        return run

    def in_place(op, *more):
        def run(x, r, w):
            x, r = x + 1, r + 1  # torch 2.14 leaves a sum with 0 out.
            op(x, r, w, 1e-6, *more)
            return x, r

        return run

    def vllm(x, w):
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, w, 1e-6)
        return out

    def aiter_add(x, r, w):
        out, total = torch.empty_like(x), torch.empty_like(x)
        torch.ops.aiter.rmsnorm2d_fwd_with_add(out, x, r, total, w, 1e-6)
        return out, total

    ops = torch.ops
    cases = (
        ((x, w), lambda x, w: ops.vllm_ir.rms_norm(x, w, 1e-6)),
        ((x, r, w), lambda x, r, w: pair(ops.vllm_ir.fused_add_rms_norm(x, r, w, 1e-6))),
        ((x, w), lambda x, w: ops.aiter.rms_norm(x, w, 1e-6)),
        ((x, w), lambda x, w: ops.aiter.rmsnorm2d_fwd(x, w, 1e-6, 1)),
        ((x, w), lambda x, w: ops.aiter.layernorm2d_fwd(x, w, w, 1e-6)),
        ((x, r, w), aiter_add),
        ((x, w), vllm),
        ((x, r, w), in_place(ops._C.fused_add_rms_norm)),
        ((x, w), written(ops.sgl_kernel.rmsnorm)),
        ((x, w), written(ops.sgl_kernel.gemma_rmsnorm)),
        ((x, r, w), in_place(ops.sgl_kernel.fused_add_rmsnorm, False)),
        ((x, r, w), in_place(ops.sgl_kernel.gemma_fused_add_rmsnorm, False)),
        ((x, w), written(ops.flashinfer.rmsnorm)),
        ((x, w), written(ops.flashinfer.gemma_rmsnorm)),
        ((x, r, w), in_place(ops.flashinfer.fused_add_rmsnorm, False)),
        ((x, r, w), in_place(ops.flashinfer.gemma_fused_add_rmsnorm, False)),
    )
    assert len(cases) == sum(len(names) for names in standins.OPS.values())
    for args, fn in cases:
        assert_same(compiled(fn), fn, *args)
    found = "\n".join(rewritten_op(fn, *args) for args, fn in cases)
    assert_expected_inline(
        found + "\n",
        """\
rms_norm_1 = fixpass.rms_norm(x, w, None, 1e-06, norm_dtype=bf16) bf16[4, 64]
add_rms_norm = fixpass.add_rms_norm(x, r, w, None, 1e-06, norm_dtype=bf16) (bf16[4, 64], bf16[4, 64])
rms_norm_1 = fixpass.rms_norm(x, w, None, 1e-06) bf16[4, 64]
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, norm_dtype=bf16) bf16[4, 64]
layer_norm = fixpass.layer_norm(x, w, w, 1e-06) bf16[4, 64]
add_rms_norm = fixpass.add_rms_norm(x, r, w, None, 1e-06) (bf16[4, 64], bf16[4, 64])
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, norm_dtype=bf16) bf16[4, 64]
add_rms_norm = fixpass.add_rms_norm(add, add_1, w, None, 1e-06, norm_dtype=bf16) (bf16[4, 64], bf16[4, 64])
rms_norm = fixpass.rms_norm(x, w, None, 1e-06) bf16[4, 64]
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, weight_offset=1.0, weight_dtype=f32) bf16[4, 64]
add_rms_norm = fixpass.add_rms_norm(add, add_1, w, None, 1e-06) (bf16[4, 64], bf16[4, 64])
add_rms_norm = fixpass.add_rms_norm(add, add_1, w, None, 1e-06, weight_offset=1.0, weight_dtype=f32) (bf16[4, 64], bf16[4, 64])
rms_norm = fixpass.rms_norm(x, w, None, 1e-06) bf16[4, 64]
rms_norm = fixpass.rms_norm(x, w, None, 1e-06, weight_offset=1.0, weight_dtype=f32) bf16[4, 64]
add_rms_norm = fixpass.add_rms_norm(add, add_1, w, None, 1e-06) (bf16[4, 64], bf16[4, 64])
add_rms_norm = fixpass.add_rms_norm(add, add_1, w, None, 1e-06, weight_offset=1.0, weight_dtype=f32) (bf16[4, 64], bf16[4, 64])
""",
    )


def test_aiters_gemma_flag_is_an_offset_of_the_weight():
    (row,) = [row for row in OPAQUE_NORMS if row.name == "aiter::rmsnorm2d_fwd_with_add"]
    call = {"input": None, "residual_in": None, "weight": None, "epsilon": 1e-6}
    offsets = []
    for flag in (False, True):
        _, _, steps = read_opaque(row, {**call, "gemma_norm": flag}, bf16(2, 8))
        offsets.append(steps.get("weight_offset"))
    assert offsets == [None, 1.0]


def test_a_variance_over_a_part_of_the_row_is_missed_by_its_argument():
    standins.register()

    def partial(x, w):
        return torch.ops.vllm_ir.rms_norm(x, w, 1e-6, 32)

    gm = trace(partial, bf16(4, 64), bf16(64))
    (remark,) = PIPELINE.run(gm.graph).of_kind("missed")
    assert remark.text == "vllm_ir::rms_norm is called with variance_size=32"

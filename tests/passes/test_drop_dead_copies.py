"""drop-dead-copies: a norm reads what was copied when its kernel can."""

import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pipeline
from fixpass.lowering.target import CPU, Target
from fixpass.passes import default_passes
from fixpass.testing import assert_same, bf16, text, trace
from helpers.spellings import llama

OURS = Target("cuda:sm_90", "cuda", ("strided_rms_norm", "strided_add_rms_norm", "inductor"))


def run(target, fn, *args, **kwargs):
    gm = trace(fn, *args, **kwargs)
    report = Pipeline(default_passes(target), verify=True, strict=True).run(gm.graph)
    remarks = report.of_pass("drop-dead-copies")
    return text(gm.graph), "".join(f"{remark}\n" for remark in remarks), report.bytes_saved


def seed_workaround(qkv, weight):
    """What engines write by hand: copy, flatten, normalise, give the shape back."""
    q = qkv[:, :1024].view(-1, 8, 128)
    return llama(q.contiguous().reshape(-1, 128), weight).view(q.shape)


def test_the_workaround_of_engines_is_taken_out_again():
    graph, report, saved = run(OURS, seed_workaround, bf16(5, 3072), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(qkv: bf16[5, 3072], weight: bf16[128])
    slice_1 = slice.Tensor(qkv, 1, 0, 1024)                                                                    bf16[5, 1024][3072, 1]
    view = view(slice_1, [-1, 8, 128])                                                                         bf16[5, 8, 128][3072, 128, 1]
    rms_norm_1 = fixpass.rms_norm(view, weight, None, 1e-06, norm_dtype=bf16, kernel_name='strided_rms_norm')  bf16[5, 8, 128]
    reshape = reshape(rms_norm_1, [-1, 128])                                                                   bf16[40, 128]
    view_2 = view(reshape, [5, 8, 128])                                                                        bf16[5, 8, 128]
    return view_2
""",
    )
    assert_expected_inline(
        report,
        """\
applied rms_norm_1: x read from view, not from its copy
""",
    )
    assert saved == 2 * 5 * 1024 * 2


def test_a_copy_that_the_kernel_needs_stays_and_says_so():
    aiter = Target("rocm:gfx942", "cuda", ("aiter_rms_norm",))
    graph, report, saved = run(aiter, seed_workaround, bf16(5, 3072), bf16(128))
    assert "clone" in graph
    assert_expected_inline(
        report,
        """\
missed  rms_norm: x stays copied: aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 8, 128][3072, 128, 1]
""",
    )
    assert saved == 0


def test_a_copy_that_something_else_reads_stays_for_it():
    def shared(qkv, weight):
        q = qkv[:, :128].contiguous()
        return llama(q, weight), q

    graph, _, saved = run(OURS, shared, bf16(5, 3072), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(qkv: bf16[5, 3072], weight: bf16[128])
    slice_1 = slice.Tensor(qkv, 1, 0, 128)                                                                      bf16[5, 128][3072, 1]
    clone = clone(slice_1, memory_format=contiguous_format)                                                     bf16[5, 128]
    rms_norm = fixpass.rms_norm(slice_1, weight, None, 1e-06, norm_dtype=bf16, kernel_name='strided_rms_norm')  bf16[5, 128]
    return rms_norm, clone
""",
    )
    assert saved == 0


def test_a_copied_residual_is_read_from_its_source():
    def block(x, packed, weight):
        total = x + packed[:, :128].contiguous()
        return llama(total, weight), total

    graph, _, _ = run(OURS, block, bf16(5, 128), bf16(5, 256), bf16(128))
    assert_expected_inline(
        graph,
        """\
graph(packed: bf16[5, 256], x: bf16[5, 128], weight: bf16[128])
    slice_1 = slice.Tensor(packed, 1, 0, 128)                                                                                  bf16[5, 128][256, 1]
    add_rms_norm = fixpass.add_rms_norm(slice_1, x, weight, None, 1e-06, norm_dtype=bf16, kernel_name='strided_add_rms_norm')  (bf16[5, 128], bf16[5, 128])
    getitem_1 = getitem(add_rms_norm, 0)                                                                                       bf16[5, 128]
    getitem = getitem(add_rms_norm, 1)                                                                                         bf16[5, 128]
    return getitem_1, getitem
""",
    )


def test_a_reshape_that_moves_the_last_dimension_is_no_copy_of_rows():
    def moved(x, weight):
        return llama(x.t().contiguous().view(-1, 64), weight)

    graph, _, _ = run(OURS, moved, bf16(128, 6), bf16(64))
    assert "clone" in graph


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_values_and_strides_are_those_of_eager(dynamic):
    options = {"lower": "eager", "verify": True, "strict": True}
    compiled = torch.compile(seed_workaround, backend="fixpass", options=options, dynamic=dynamic)
    assert_same(compiled, seed_workaround, bf16(5, 3072), bf16(128))
    assert run(CPU, seed_workaround, bf16(5, 3072), bf16(128), dynamic=dynamic)[2] > 0

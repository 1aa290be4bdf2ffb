"""canonicalize-norms, gates: which spellings become one op, and what stops the others."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch._inductor import metrics

from fixpass import Pipeline
from fixpass.lowering.target import CPU, Target, target_named
from fixpass.passes import default_passes
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.testing import assert_same, bf16, f32, text, trace
from helpers.compiling import compiled_anew
from helpers.gated_spellings import (
    LEFT,
    gate_in_float32,
    gate_then_groups,
    norm_then_gate,
    rounded_gate,
    rounded_sigmoid_in_front,
    sigmoid_gate,
)
from helpers.spellings import llama

PIPELINE = Pipeline((CanonicalizeNorms(),), verify=True, strict=True)
EAGER = Target("eager", "cuda", ("strided_gated_rms_norm", "inductor"), prefers_fusion=False)


def rewritten(fn, *args, pipeline=PIPELINE, **kwargs):
    gm = trace(fn, *args, **kwargs)
    report = pipeline.run(gm.graph)
    return text(gm.graph), str(report)


def rows(*shape, dtype=torch.bfloat16):
    x = torch.randn(shape).to(dtype)
    torch._dynamo.mark_static(x, x.dim() - 1)
    return x


SPELLINGS = {
    norm_then_gate: ((5, 4, 16), (5, 12, 16), (16,)),
    gate_then_groups: ((5, 64), (5, 128), (64,)),
    sigmoid_gate: ((2, 3, 4, 16), (2, 3, 4, 16), (16,)),
    rounded_gate: ((5, 64), (5, 64), (64,)),
    rounded_sigmoid_in_front: ((5, 64), (5, 64), (64,)),
    gate_in_float32: ((5, 64), (5, 64), (64,)),
}
dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def operands(fn):
    args = [rows(*shape) for shape in SPELLINGS[fn]]
    if fn is gate_in_float32:
        args[1] = args[1].float()
    if fn is norm_then_gate:
        torch._dynamo.mark_static(args[0], 1)
        torch._dynamo.mark_static(args[1], 1)
    return args


def test_a_norm_and_its_gate_become_one_op():
    graph, report = rewritten(norm_then_gate, *operands(norm_then_gate), dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, packed: bf16[s0, 12, 16], x: bf16[s0, 4, 16], weight: bf16[16])
    slice_2 = slice.Tensor(packed, 1, 8, 9223372036854775807)                                                 bf16[s0, 4, 16][192, 16, 1]
    mul_4 = mul(s0, 4)                                                                                       4*s0
    clone = clone(slice_2, memory_format=contiguous_format)                                                   bf16[s0, 4, 16]
    view = view(clone, [mul_4, 16])                                                                           bf16[4*s0, 16]
    view_1 = view(x, [-1, 16])                                                                                bf16[4*s0, 16]
    gated_rms_norm = fixpass.gated_rms_norm(view_1, view, weight, 1e-06, activation='silu', norm_dtype=bf16)  bf16[4*s0, 16]
    view_2 = view(gated_rms_norm, [s0, 4, 16])                                                               bf16[s0, 4, 16]
    return view_2
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of bf16[4*s0, 16]
    applied gated_rms_norm: rms_norm of bf16[4*s0, 16] joined with silu of bf16[4*s0, 16] behind it
""",
    )


def test_a_gate_in_front_of_a_norm_over_groups_is_joined_with_the_weight_of_all_groups():
    graph, report = rewritten(gate_then_groups, *operands(gate_then_groups), dynamic=True)
    assert_expected_inline(
        graph,
        """\
graph(s0, x: bf16[s0, 64], packed: bf16[s0, 128], weight: bf16[64])
    slice_1 = slice.Tensor(packed, 1, 64, 9223372036854775807)                                                                              bf16[s0, 64][128, 1]
    gated_rms_norm = fixpass.gated_rms_norm(x, slice_1, weight, 1e-06, activation='silu', group_size=16, norm_dtype=bf16, gate_first=True)  bf16[s0, 64]
    return gated_rms_norm
""",
    )
    assert_expected_inline(
        report,
        """\
canonicalize-norms
    applied rms_norm: became rms_norm of f32[s0, 4, 16], a norm over groups of 16 of 64: mul_28 applies the weight of all groups
    applied gated_rms_norm: rms_norm of bf16[s0, 64] joined with silu of bf16[s0, 64][128, 1] in front of it, over groups of 16 of 64
""",
    )


def assert_one_op_and_every_bit(fn, args, is_dynamic):
    graph, _ = rewritten(fn, *args, dynamic=is_dynamic)
    assert graph.count("fixpass.gated_rms_norm(") == 1
    assert not any(op in graph for op in ("exp(", "sigmoid(", "fixpass.rms_norm("))
    ours = compiled_anew(fn, dynamic=is_dynamic)
    # PyTorch's own silu differs from its decomposition in the last bit of float32.
    decomposed = torch.compile(fn, backend="aot_eager_decomp_partition")
    with torch.no_grad():
        assert_same(ours, fn, *args)
        assert_same(ours, decomposed, *args, rtol=0, atol=0)


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda fn: fn.__name__)
def test_each_spelling_becomes_the_op_and_keeps_every_bit(fn):
    assert_one_op_and_every_bit(fn, operands(fn), True)


# Qwen3.5, Olmo Hybrid, Bamba and Granite have copies of the classes of Qwen3-Next and Mamba-2.
CLASSES = {
    "Qwen3NextRMSNormGated": ("qwen3_next", (64,), {}),
    "KimiLinearRMSNormGated": ("kimi_linear", (64,), {}),
    "MambaRMSNormGated": ("mamba2", (64,), {}),
    "Zamba2RMSNormGated": ("zamba2", (64, 16), {}),  # NemotronH has the same class
    "FalconH1RMSNormGated": ("falcon_h1", (64,), {"n_groups": 4}),
    "FalconH1RMSNormGated, gate first": ("falcon_h1", (64,), {"n_groups": 4, "norm_before_gate": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_of_transformers_become_the_op_and_keep_every_bit(name):
    pytest.importorskip("transformers")
    package, args, options = CLASSES[name]
    module = import_module(f"transformers.models.{package}.modeling_{package}")
    norm = getattr(module, name.partition(",")[0])(*args, **options)
    norm = norm.bfloat16().requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    assert_one_op_and_every_bit(norm, (rows(2, 3, 64), rows(2, 3, 128)[..., 64:]), False)


@pytest.mark.inductor
@pytest.mark.parametrize(
    "fn",
    [pytest.param(norm_then_gate, marks=pytest.mark.full), gate_then_groups],
    ids=lambda fn: fn.__name__,
)
def test_inductor_makes_the_kernels_and_the_bits_that_it_makes_without_fixpass(fn):
    args, results, counts = operands(fn), [], []
    for backend in ("fixpass", "inductor"):
        torch._dynamo.reset()
        metrics.reset()
        with torch.no_grad():
            results.append(torch.compile(fn, backend=backend)(*args))
        counts.append(metrics.generated_kernel_count)
    assert counts[0] <= counts[1]
    assert torch.equal(*results)


def missed(fn, *args):
    """The reason why the gate stays, or the graph if it does not."""
    graph, report = rewritten(fn, *args)
    lines = [line for line in report.splitlines() if "missed" in line]
    return lines[0].split(": ", 1)[1] if lines else graph


@pytest.mark.parametrize("fn", LEFT, ids=lambda fn: fn.__name__)
def test_what_stops_the_rewrite_is_said(fn):
    assert missed(fn, bf16(5, 64), bf16(5, 64), bf16(64)) == LEFT[fn]


def test_a_norm_without_a_gate_gets_no_remark():
    def swiglu(x, gate, weight):
        return F.silu(llama(x, weight)) * gate

    _, report = rewritten(swiglu, bf16(5, 64), bf16(5, 64), bf16(64))
    assert "gate" not in report
    assert "missed" not in report


def test_in_training_the_norm_stays_and_has_its_gradients():
    args = [f32(5, 64).requires_grad_() for _ in range(2)] + [f32(64).requires_grad_()]
    assert_same(compiled_anew(sigmoid_gate), sigmoid_gate, *args, gradients=True)


def test_at_equal_cost_inductor_is_chosen_and_fuses():
    passes = (CanonicalizeNorms(), SelectNormKernel(target_named("cuda:sm_90")))
    args = (bf16(5, 64), bf16(5, 128), bf16(64))
    _, report = rewritten(gate_then_groups, *args, pipeline=Pipeline(passes))
    assert_expected_inline(
        report.partition("select-norm-kernel\n")[2],
        """\
    applied gated_rms_norm: inductor reads bf16[5, 64]; no copy; reads and writes 1,920 bytes in 1 launch (strided_gated_rms_norm: 1,920 bytes in 1 launch)
""",
    )


def test_without_inductor_our_kernel_reads_the_slice_and_no_copy_of_it():
    pipeline = Pipeline(default_passes(EAGER), verify=True, strict=True)
    graph, report = rewritten(norm_then_gate, *operands(norm_then_gate), pipeline=pipeline)
    assert_expected_inline(
        graph,
        """\
graph(packed: bf16[5, 12, 16], x: bf16[5, 4, 16], weight: bf16[16])
    slice_1 = slice.Tensor(packed, 1, 8, 9223372036854775807)                                                                                             bf16[5, 4, 16][192, 16, 1]
    view_1 = view(x, [-1, 16])                                                                                                                            bf16[20, 16]
    reshape = reshape(view_1, [5, 4, 16])                                                                                                                 bf16[5, 4, 16]
    gated_rms_norm_1 = fixpass.gated_rms_norm(reshape, slice_1, weight, 1e-06, activation='silu', norm_dtype=bf16, kernel_name='strided_gated_rms_norm')  bf16[5, 4, 16]
    reshape_1 = reshape(gated_rms_norm_1, [20, 16])                                                                                                       bf16[20, 16]
    view_2 = view(reshape_1, [5, 4, 16])                                                                                                                  bf16[5, 4, 16]
    return view_2
""",
    )
    assert_expected_inline(
        report.partition("select-norm-kernel\n")[2],
        """\
    applied gated_rms_norm: strided_gated_rms_norm reads bf16[5, 4, 16]; no copy; reads and writes 1,920 bytes in 1 launch (inductor: 1,920 bytes in 1 launch)
drop-dead-copies
    applied gated_rms_norm_1: gate read from slice_1, not from its copy
bytes saved: 1,280
""",
    )


def transposed_and_packed(x, packed, weight):
    """As in a model: x comes out of attention with its heads in front."""
    return norm_then_gate(x.transpose(0, 1).contiguous(), packed, weight)


@dynamic
@pytest.mark.parametrize("target", [CPU, EAGER], ids=lambda target: target.name)
def test_copies_of_x_and_of_the_gate_go_together(target, dynamic):
    pipeline = Pipeline(default_passes(target), verify=True, strict=True)
    x = rows(4, 5, 16)
    torch._dynamo.mark_static(x, 0)
    args = (x, *operands(norm_then_gate)[1:])
    graph, _ = rewritten(transposed_and_packed, *args, pipeline=pipeline, dynamic=dynamic)
    # Eager's result is contiguous, so Inductor's code may copy it; no operand is copied.
    assert graph.count("= clone(") == (target is CPU)
    with torch.no_grad():
        assert_same(
            compiled_anew(transposed_and_packed, dynamic=dynamic), transposed_and_packed, *args
        )

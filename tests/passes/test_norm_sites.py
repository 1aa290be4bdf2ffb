"""canonicalize-norms: norms behind copies, sums read through views, groups, and whose norm it is."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import fixpass
from fixpass import Pipeline
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.testing import assert_same, bf16, f32, text, trace
from helpers.compiling import compiled_anew
from helpers.spellings import llama

PIPELINE = Pipeline((CanonicalizeNorms(),), verify=True, strict=True)


def rewritten(fn, *args, **kwargs):
    """The norm ops of the graph after the pass, and the report without its first line."""
    gm = trace(fn, *args, **kwargs)
    report = str(PIPELINE.run(gm.graph)).partition("\n")[2]
    lines = [line.strip() for line in text(gm.graph).splitlines() if "fixpass." in line]
    return " / ".join(" ".join(line.split()) for line in lines), report


def eager_rms_norm(x, weight=None):
    """F.rms_norm in float64: the value that no graph has touched."""
    h = x.double()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h if weight is None else h * weight.double()).to(x.dtype)


def permuted(x, w):
    return F.rms_norm(x.permute(0, 2, 1, 3), (64,), w, 1e-6)


def permuted_without_weight(x, w):
    return F.rms_norm(x.transpose(1, 2), (64,), None, 1e-6)


def every_second_row(x, w):
    return F.rms_norm(x.transpose(1, 2)[:, :, ::2], (64,), w, 1e-6)


def weight_in_float32(x, w):
    return F.rms_norm(x.permute(2, 0, 1, 3), (64,), w.float(), 1e-6)


def rows_of_all_heads(x, w):
    return F.rms_norm(x.transpose(1, 2), (64,), w, 1e-6).reshape(-1, 64)


def copied_by_the_model(x, w):
    return llama(x.transpose(1, 2), w).contiguous()


COPIED = [
    permuted,
    permuted_without_weight,
    every_second_row,
    weight_in_float32,
    rows_of_all_heads,
    copied_by_the_model,
]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.full),
        pytest.param(torch.float32, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", COPIED)
def test_the_cast_behind_a_copy_belongs_to_the_norm(fn, dynamic, dtype):
    x, w = f32(2, 6, 4, 64).to(dtype), f32(64).to(dtype)
    gm = trace(fn, x, w, dynamic=dynamic)
    PIPELINE.run(gm.graph)
    (norm,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fixpass.rms_norm.default)
    assert norm.meta["val"].dtype == dtype
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert_same(compiled_anew(fn, dynamic=dynamic), fn, x, w)


def test_the_value_of_a_permuted_16_bit_norm_is_that_of_float64():
    x, w = bf16(2, 6, 4, 64), bf16(64)
    got = compiled_anew(permuted)(x, w)
    wanted = eager_rms_norm(x.permute(0, 2, 1, 3), w)
    assert got.is_contiguous()
    torch.testing.assert_close(got, wanted, rtol=8e-3, atol=1e-3)


def test_no_kernel_is_refused_for_the_float32_inside_a_norm():
    x, w = bf16(2, 6, 4, 64), bf16(64)
    with torch.no_grad():
        report = str(fixpass.explain(permuted, x, w, target="rocm:gfx942"))
    assert "f32[" not in report
    assert "failed" not in report
    assert "x is dense 2-D does not hold for bf16[2, 4, 6, 64][1536, 64, 256, 1]" in report


def flattened(x, r, w):
    total = r + x
    return llama(total.reshape(-1, 64), w).reshape(total.shape), total


def returned_flat(x, r, w):
    total = (r + x).view(-1, 64)
    return llama(total, w), total


def viewed_twice(x, r, w):
    total = r + x
    return llama(total.unsqueeze(1).flatten(0, 2), w), total


def squeezed(x, r, w):
    total = r.unsqueeze(1) + x.unsqueeze(1)
    return F.rms_norm(total.squeeze(1), (64,), w, 1e-6), total


def rounded_to_float32(x, r, w):
    total = r + x
    return llama(total.view(-1, 64), w.float()), total


VIEWED = [flattened, returned_flat, viewed_twice, squeezed, rounded_to_float32]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", VIEWED)
def test_a_sum_that_the_norm_reads_through_a_view_is_joined(fn, dynamic):
    x, r, w = bf16(2, 5, 64), bf16(2, 5, 64), bf16(64)
    ops, report = rewritten(fn, x, r, w, dynamic=dynamic)
    assert ops.count("fixpass.add_rms_norm(") == 1
    assert "fixpass.rms_norm(" not in ops
    assert report.count("applied") == 1
    assert_same(compiled_anew(fn, dynamic=dynamic), fn, x, r, w)


def test_a_sum_read_through_a_view_by_the_norm_alone_stays_an_add():
    ops, report = rewritten(
        lambda x, r, w: llama((x + r).view(-1, 64), w), bf16(2, 5, 64), bf16(2, 5, 64), bf16(64)
    )
    assert "fixpass.rms_norm(view" in ops
    assert "joined" not in report


def test_a_view_that_changes_rows_does_not_join():
    def heads(x, r, w):
        total = r + x
        return llama(total.view(-1, 4, 16), w), total

    ops, _ = rewritten(heads, bf16(5, 64), bf16(5, 64), bf16(16))
    assert "add_rms_norm" not in ops
    assert_same(compiled_anew(heads), heads, bf16(5, 64), bf16(5, 64), bf16(16))


def test_a_broadcast_behind_a_view_is_missed_with_its_layouts():
    def block(x, r, w):
        total = r + x
        return llama(total.view(-1, 64), w), total

    _, report = rewritten(block, bf16(2, 5, 64), bf16(64), bf16(64))
    assert "missed  rms_norm: add broadcasts bf16[64] to bf16[2, 5, 64]\n" in report


def flat_weight(x, w):
    g = x.float().view(-1, 4, 16)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * g.view(-1, 64).to(x.dtype)


def weight_of_each_group(x, w):
    g = x.view(-1, 4, 16)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (g * w.view(4, 16)).view(-1, 64)


def gated(x, w):
    g = F.silu(x.float()).view(-1, 4, 16)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * g.flatten(1).to(x.dtype)


@pytest.mark.parametrize("fn", [flat_weight, weight_of_each_group, gated])
def test_a_norm_over_groups_is_called_one(fn):
    _, report = rewritten(fn, bf16(5, 64), bf16(64))
    assert "a norm over groups of 16 of 64: mul_" in report
    assert_same(compiled_anew(fn), fn, bf16(5, 64), bf16(64))


def test_a_norm_over_groups_of_an_unknown_size_is_called_one():
    _, report = rewritten(flat_weight, bf16(5, 64), bf16(64), dynamic=True)
    assert "a norm over groups of (s1//4) of s1: mul_" in report


def test_group_norm_is_missed_by_its_name():
    def group_norm(x, w):
        return F.group_norm(x, 4, w, w)

    for x in (f32(3, 64), f32(3, 64, 5)):
        _, report = rewritten(group_norm, x, f32(64))
        assert_expected_inline(
            report,
            """\
    missed  rsqrt: var_mean normalises groups of 16 of 64 channels, which no kernel computes
""",
        )


def test_heads_with_a_weight_each_are_no_groups():
    _, report = rewritten(lambda x, w: llama(x.view(-1, 4, 16), w), bf16(5, 64), bf16(16))
    assert "group" not in report


def test_an_l2_norm_is_called_one():
    def l2_norm(x, w):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    ops, report = rewritten(l2_norm, f32(4, 64), f32(64))
    assert ops == ""
    assert_expected_inline(
        report,
        """\
    missed  rsqrt: an L2 norm of f32[4, 64]: no kernel computes one, and Inductor fuses it
""",
    )


class RMSNorm(nn.Module):
    """A norm whose method engines call without the module."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(16)), offset

    def forward_native(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (self.offset + self.weight.float())).to(x.dtype)

    def functional(self, x):
        return F.rms_norm(x, (16,), self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm, self.v_norm = RMSNorm(), RMSNorm(1.0), RMSNorm()

    def forward(self, x):
        x = x.view(-1, 4, 16)
        return (
            self.q_norm.forward_native(x),
            self.k_norm.forward_native(x),
            self.v_norm.functional(x),
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@torch.no_grad()
def test_a_norm_is_named_after_the_module_of_its_weight():
    report = fixpass.explain(Model().eval().bfloat16(), bf16(5, 64))
    applied = [r.where for r in report.of_pass("canonicalize-norms") if r.kind == "applied"]
    layers = [f"layers.{i}.{name}_norm" for i in range(2) for name in "qkv"]
    assert applied == layers
    assert "applied 2 x layers.*.q_norm: became rms_norm" in str(report)

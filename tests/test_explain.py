"""`fixpass.explain` and the command line: what would happen, on this device and on absent ones."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fixpass
from fixpass.runtime.errors import ConfigError
from fixpass.testing import bf16, f32


class Attention(nn.Module):
    """Heads of a packed projection, normalised."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 192, bias=False, dtype=torch.bfloat16)
        self.q_norm = nn.RMSNorm(16, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, x):
        return self.q_norm(self.qkv(x)[..., :64].view(*x.shape[:-1], 4, 16))


@torch.no_grad()
def test_the_report_names_modules_layouts_and_kernels():
    report = fixpass.explain(Attention(), bf16(5, 32))
    assert_expected_inline(
        str(report),
        """\
target cpu
On cpu: 1 of 1 norm reads a strided layout without a copy; the norm takes 1 launch.
canonicalize-norms
    applied rms_norm (q_norm): became rms_norm of bf16[5, 4, 16][192, 16, 1]
select-norm-kernel
    applied rms_norm (q_norm): inductor reads bf16[5, 4, 16][192, 16, 1]; no copy; reads and writes 1,280 bytes in 1 launch
select-linear-kernel
    applied skinny_linear (qkv): skinny_linear reads bf16[32, 192][1, 32] once, 12,288 bytes
""",
    )


class Noisy(nn.Module):
    """A norm whose result gets noise, in inference too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)

    def forward(self, x):
        return nn.functional.dropout(self.norm(x), 0.5, training=True) + torch.rand_like(x)


@torch.no_grad()
def test_a_model_that_draws_random_numbers_is_explained_and_run():
    x = f32(4, 16)
    report = str(fixpass.explain(Noisy(), x))
    assert "applied rms_norm (norm): became rms_norm of f32[4, 16]" in report
    run = torch.compile(Noisy(), backend="fixpass", options={"lower": "eager", "strict": True})
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@torch.no_grad()
def test_an_absent_device_is_explained_with_its_kernels():
    report = fixpass.explain(Attention(), bf16(5, 32), target="rocm:gfx942")
    assert_expected_inline(
        str(report),
        """\
target rocm:gfx942
On rocm:gfx942: 1 of 1 norm reads a strided layout without a copy; the norm takes 1 launch instead of 2; 1,280 bytes not moved.
canonicalize-norms
    applied rms_norm (q_norm): became rms_norm of bf16[5, 4, 16][192, 16, 1]
select-norm-kernel
    missed  rms_norm (q_norm): aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 4, 16][192, 16, 1]; a copy would move 1,280 bytes
    applied rms_norm (q_norm): inductor reads bf16[5, 4, 16][192, 16, 1]; no copy; reads and writes 1,280 bytes in 1 launch (strided_rms_norm: 1,280 bytes in 1 launch)
bytes saved: 1,280
""",
    )


@torch.no_grad()
def test_an_operation_without_a_fake_implementation_for_the_device_keeps_its_strides():
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.RMSNorm(16, eps=1e-6)

        def forward(self, x):
            return self.norm(self.conv(x.transpose(1, 2)))

    report = fixpass.explain(Convolved(), f32(2, 18, 4), target="cuda:sm_90")
    assert_expected_inline(
        str(report),
        """\
target cuda:sm_90
On cuda:sm_90: 1 norm over dense tensors; the norm takes 1 launch.
explain
    missed  graph: aten.convolution.default has no fake implementation for cuda:sm_90: it keeps its strides
canonicalize-norms
    applied rms_norm (norm): became rms_norm of f32[2, 4, 16]
select-norm-kernel
    applied rms_norm (norm): inductor reads f32[2, 4, 16]; no copy; reads and writes 1,024 bytes in 1 launch (strided_rms_norm: 1,024 bytes in 1 launch)
""",
    )


def test_an_unknown_target_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match="known targets: cpu, cuda:sm_80"):
        fixpass.explain(Attention(), bf16(5, 32), target="tpu")


def test_explain_leaves_the_models_own_compiles_alone():
    model, x = Attention(), bf16(5, 32)
    compiled = torch.compile(model, backend="fixpass", options={"lower": "eager"})
    want = compiled(x)
    for target in (None, "cuda:sm_90", None):
        fixpass.explain(model, x, target=target)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), want)


def test_graph_breaks_are_reported_one_after_the_other():
    def broken(x):
        y = torch.nn.functional.rms_norm(x, (32,))
        torch._dynamo.graph_break()
        return torch.nn.functional.rms_norm(y, (32,))

    report = fixpass.explain(broken, bf16(5, 32))
    assert len(report.of_pass("canonicalize-norms")) == 2


class Eval(nn.Module):
    """A norm in front of a weight that trains."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.norm(x))


def missed_for_training(model, x):
    report = fixpass.explain(model, x, target="rocm:gfx942")
    return [remark for remark in report.of_kind("missed") if "backward" in remark.text]


def test_a_module_in_eval_mode_is_traced_without_gradients():
    model, x = Eval().eval(), f32(4, 16)
    assert not missed_for_training(model, x)
    assert not missed_for_training(model.forward, x)
    assert not missed_for_training(nn.Sequential(model).eval(), x)
    assert torch.is_grad_enabled()


def test_a_step_of_training_is_traced_with_gradients():
    model, x = Eval(), f32(4, 16)
    assert missed_for_training(model, x)
    assert missed_for_training(model.eval(), x.requires_grad_())
    assert missed_for_training(lambda x: model(x), x)

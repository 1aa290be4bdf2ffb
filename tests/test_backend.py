"""The backend by name, end to end: inference, training, dynamic shapes, modes, hooks."""

import pytest
import torch
from torch import nn

import fixpass
from fixpass.testing import assert_same, bf16, f32
from helpers.compiling import EAGER


class Block(nn.Module):
    """Pre-norm, a packed projection, q and k norms, a residual."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6, dtype=dtype)
        self.qkv = nn.Linear(32, 96, dtype=dtype)
        self.q_norm = nn.LayerNorm(16, dtype=dtype)
        self.out = nn.Linear(32, 32, dtype=dtype)
        self.post = nn.RMSNorm(32, eps=1e-6, dtype=dtype)
        for name, parameter in self.named_parameters():
            if "norm" in name or "post" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q = self.q_norm(q.unflatten(-1, (2, 16))).flatten(-2)
        x = x + self.out(torch.sigmoid(q * k) * v)
        return self.post(x), x


def compiled(model, options=None, **more):
    return torch.compile(model, backend="fixpass", options=options, fullgraph=True, **more)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_values_gradients_and_strides_are_those_of_eager(dynamic, gradients):
    block = Block()
    run = compiled(block, EAGER, dynamic=dynamic)
    for rows in (5, 9):
        x = f32(2, rows, 32).requires_grad_(gradients)
        assert_same(run, block, x, gradients=gradients)


@pytest.mark.inductor
def test_through_inductor_values_gradients_and_strides_are_those_of_eager():
    block = Block()
    assert_same(compiled(block), block, f32(2, 5, 32))
    assert_same(compiled(block), block, f32(2, 5, 32).requires_grad_(), gradients=True)


@pytest.mark.inductor
def test_through_inductor_with_dynamic_shapes_and_a_mode():
    block = Block()
    run = compiled(block, dynamic=True, mode="max-autotune-no-cudagraphs")
    for rows in (5, 9):
        assert_same(run, block, f32(2, rows, 32))


@pytest.mark.inductor
def test_a_graph_with_nothing_for_us_is_inductors_to_the_letter():
    from torch._inductor.utils import run_and_get_code

    def plain(x):
        return torch.relu(x * x.t()).sum(-1)

    codes = []
    for backend in ("inductor", "fixpass"):
        torch._dynamo.reset()
        _, (code,) = run_and_get_code(torch.compile(plain, backend=backend), f32(8, 8))
        # The first line numbers the compiles of this process.
        codes.append(code.partition("\n")[2])
    assert codes[0] == codes[1]


@pytest.mark.inductor
def test_a_hook_that_the_user_set_runs_before_ours():
    seen = []
    hook = {"post_grad_custom_pre_pass": lambda graph: seen.append(len(graph.nodes))}
    block = Block()
    assert_same(compiled(block, {"inductor": hook}), block, f32(2, 5, 32))
    assert len(seen) == 1


def test_a_pass_of_the_users_own_runs_after_ours():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Count(fixpass.Pass):
        """Says how many norms are left."""

        name: ClassVar[str] = "count"

        def run(self, graph, result):
            found = [node for node in graph.nodes if "norm" in node.name]
            result.missed(graph.output_node(), f"{len(found)} norms left")

    block = Block()
    assert_same(compiled(block, {**EAGER, "passes": (Count(),)}), block, f32(2, 5, 32))
    assert fixpass.last_reports()[-1].of_pass("count")[0].text == "0 norms left"


def test_disabled_passes_do_not_run():
    block, before = Block(), fixpass.last_reports()
    disable = ("canonicalize-norms", "functionalize-norms", "select-linear-kernel")
    assert_same(compiled(block, {**EAGER, "disable": disable}), block, f32(2, 5, 32))
    assert fixpass.last_reports() == before


def test_compile_is_torch_compile_with_our_options():
    block = Block()
    assert_same(fixpass.compile(block, lower="eager"), block, f32(2, 5, 32))
    with pytest.raises(fixpass.FixpassError, match="unknown option 'lowering'"):
        fixpass.compile(block, lowering="eager")


def test_a_model_in_bfloat16_stays_within_a_rounding_of_eager():
    block = Block(torch.bfloat16)
    assert_same(compiled(block, EAGER), block, bf16(2, 5, 32), rtol=0.016, atol=0.016)

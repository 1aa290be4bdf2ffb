"""With `dynamic=True` the eps of a norm is a guarded constant; other floats stay symbols."""

import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

from fixpass.testing import assert_same, f32, text, trace

EAGER = {"lower": "eager", "strict": True}


class Norm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.eps = eps

    def forward(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale)


class Scaled(Norm):
    def __init__(self):
        super().__init__()
        self.scale = 3.0

    def forward(self, x):
        return functional.rms_norm(x, (8,), self.weight, self.eps) * self.scale


class Counter:
    """A backend that counts the traces it is handed and delegates to fixpass."""

    def __init__(self):
        self.traces = 0

    def __call__(self, gm, example_inputs):
        from fixpass.backend import fixpass

        self.traces += 1
        return fixpass(gm, example_inputs, options=EAGER)


def test_a_dynamic_trace_has_the_eps_as_a_constant():
    graph = trace(Norm(), f32(3, 8), dynamic=True).graph
    assert_expected_inline(
        text(graph),
        """\
graph(s0, x: f32[s0, 8], weight: f32[8])
    pow_1 = pow.Tensor_Scalar(x, 2)     f32[s0, 8]
    mean = mean.dim(pow_1, [-1], True)  f32[s0, 1]
    add_6 = add.Tensor(mean, 1e-06)     f32[s0, 1]
    rsqrt = rsqrt(add_6)                f32[s0, 1]
    mul_5 = mul.Tensor(x, rsqrt)        f32[s0, 8]
    mul_8 = mul.Tensor(weight, mul_5)   f32[s0, 8]
    return mul_8
""",
    )


def test_other_floats_stay_symbols():
    graph = trace(Scaled(), f32(3, 8), dynamic=True).graph
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    assert "scale" in placeholders
    assert "eps" not in placeholders


def test_another_eps_compiles_again():
    norm = Norm()
    backend = Counter()
    compiled = torch.compile(norm, backend=backend, dynamic=True, fullgraph=True)
    assert_same(compiled, norm, f32(3, 8))
    asked = backend.traces
    assert_same(compiled, norm, f32(4, 8))
    assert backend.traces == asked, "another length compiled again"
    norm.eps = 0.5
    assert_same(compiled, norm, f32(3, 8))
    assert backend.traces > asked


def test_one_restart_serves_every_norm():
    model = nn.Sequential(*(Norm(10.0**-n) for n in range(2, 6)))
    backend = Counter()
    torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(f32(3, 8))
    assert backend.traces == 2

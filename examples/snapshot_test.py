"""A snapshot test of a model of your own: what fixpass makes of it, and that it stays right.

    python -m pytest examples/snapshot_test.py

Write an empty snapshot in triple quotes, run once with EXPECTTEST_ACCEPT=1, and read the diff.
"""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fixpass
from fixpass.testing import assert_same, bf16, text, trace


class QueryNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.norm(qkv[:, :256].view(-1, 4, 64))


def test_the_graph_that_passes_see() -> None:
    graph = trace(lambda qkv: torch.relu(qkv[:, :256]), bf16(5, 768), dynamic=True).graph
    assert_expected_inline(
        text(graph),
        """\
graph(s0, s1, qkv: bf16[s0, s1])
    slice_2 = slice.Tensor(qkv, 1, 0, 256)  bf16[s0, 256][s1, 1]
    relu = relu(slice_2)                    bf16[s0, 256]
    return relu
""",
    )


@torch.no_grad()
def test_what_would_happen_on_rocm() -> None:
    report = fixpass.explain(QueryNorm(), bf16(5, 768), target="rocm:gfx942")
    assert_expected_inline(
        str(report),
        """\
target rocm:gfx942
On rocm:gfx942: 1 of 1 norm reads a strided layout without a copy; the norm takes 1 launch instead of 2; 5,120 bytes not moved.
canonicalize-norms
    applied rms_norm (norm): became rms_norm of bf16[5, 4, 64][768, 64, 1]
select-norm-kernel
    missed  rms_norm (norm): aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 4, 64][768, 64, 1]; a copy would move 5,120 bytes
    applied rms_norm (norm): inductor reads bf16[5, 4, 64][768, 64, 1]; no copy; reads and writes 5,120 bytes in 1 launch (strided_rms_norm: 5,120 bytes in 1 launch)
bytes saved: 5,120
""",
    )


def test_values_gradients_and_strides_are_those_of_eager() -> None:
    model = QueryNorm()
    compiled = fixpass.compile(model, lower="eager", verify=True)
    qkv = bf16(5, 768).requires_grad_()
    assert_same(compiled, model, qkv, gradients=True, rtol=0.016, atol=0.016)

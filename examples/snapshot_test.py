"""Tests for your CI: they fail when a rewrite stops to fire, or when a value changes.

    python -m pytest examples/snapshot_test.py

For a new snapshot write an empty string in triple quotes, run once with EXPECTTEST_ACCEPT=1, and
read the diff.
"""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fixpass
from fixpass.testing import assert_same, bf16


class QueryNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.norm(qkv[:, :256].view(-1, 4, 64))


@torch.no_grad()
def test_the_norm_gets_a_kernel_that_needs_no_copy() -> None:
    for target, kernel in {"rocm:gfx942": "inductor", "cuda:sm_90": "inductor"}.items():
        fixpass.explain(QueryNorm(), bf16(5, 768), target=target, expect={"norm": kernel})


@torch.no_grad()
def test_the_report_for_rocm() -> None:
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

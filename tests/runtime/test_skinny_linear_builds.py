"""Builds of skinny_linear: for other processors, without a compiler, once a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from fixpass.runtime import extension

COMPARE = """
import torch
from fixpass.runtime import extension, linear
extension.FLAGS = tuple({flag!r} if f == "-march=native" else f for f in extension.FLAGS)
assert linear.unavailable() == ""
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows in (1, 2, 3, 4, 5, 7, 9, 12, 16):
        for depth, size in ((1, 1), (33, 65), (130, 7), (1030, 129)):
            for is_rows in (True, False):
                x, weight = torch.randn(rows, depth).to(dtype), torch.randn(depth, size).to(dtype)
                stored = weight.t().contiguous().t() if is_rows else weight
                got = torch.ops.fixpass.skinny_linear(x, stored, None)
                exact = x.double() @ weight.double()
                error = (got - exact).abs().max() / exact.abs().max()
                assert error < 4 * torch.finfo(dtype).eps * max(1, depth**0.5 / 8), (dtype, rows)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="names x86-64 processors to GCC")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512"])
def test_other_processors_get_a_right_kernel(processor):
    flags = Path("/proc/cpuinfo").read_text()
    wanted = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512vl"}[processor]
    if wanted not in flags:
        pytest.skip(f"this processor has no {wanted}")
    command = [sys.executable, "-P", "-c", COMPARE.format(flag=f"-march={processor}")]
    subprocess.run(command, check=True, timeout=300)


def test_a_process_without_a_compiler_computes_with_torch():
    script = (
        "import torch, warnings; from fixpass.runtime import extension, linear\n"
        "extension.load = lambda name, **_: extension.Extension(None, 'no compiler')\n"
        "assert linear.unavailable() == 'no compiler'\n"
        "x, w = torch.randn(2, 5), torch.randn(5, 7)\n"
        "assert torch.equal(torch.ops.fixpass.skinny_linear(x, w, None), x @ w)\n"
        "assert torch.equal(torch.ops.fixpass.skinny_linears(x, [w], [None])[0], x @ w)\n"
        "e = torch.stack([w, -w]); ends = torch.tensor([1, 2])\n"
        "wanted = torch.stack([x[0] @ w, x[1] @ -w])\n"
        "torch.testing.assert_close(torch.ops.fixpass.skinny_experts(x, e, ends), wanted)\n"
        "assert torch.equal(linear.direct_call()(x, w, None, out=torch.empty(2, 7)), x @ w)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=120)


def test_the_extension_compiles_once():
    assert extension.load("skinny_linear", uses_torch=True).library is not None

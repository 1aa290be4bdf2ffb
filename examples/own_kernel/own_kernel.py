"""A package with a norm kernel of its own, which reads dense rows only, and its contract.

    pip install examples/own_kernel
    python -m own_kernel

The entry point of the group `fixpass.kernels` in pyproject.toml makes fixpass find `KERNEL`. The
option `norm_kernels` prefers it. fixpass inserts a relayout for an operand that breaks the contract.
"""

from typing import Any

import torch
from torch import Tensor

import fixpass
from fixpass.lowering.constraints import Dense2D
from fixpass.lowering.contract_table import PLAIN


@torch.library.custom_op("own::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (x.shape[-1], 1))
    scale = rows.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return ((rows * scale).to(x.dtype) * weight).view(x.shape)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def call(x: Tensor, weight: Tensor, bias: None, eps: float, **steps: Any) -> Tensor:
    return rms_norm(x, weight, eps)


KERNEL = fixpass.Kernel(
    "own_rms_norm",
    "rms_norm",
    fixpass.Contract((Dense2D("x"), Dense2D("out"), *PLAIN), "own_kernel.py: rows are dense"),
    "own_kernel:call",
    needs="own_kernel",
)


@torch.no_grad()
def main() -> None:
    norm = torch.nn.RMSNorm(64)
    heads = torch.randn(5, 768)[:, :256].unflatten(-1, (4, 64))  # of a packed projection
    compiled = fixpass.compile(norm, lower="eager", norm_kernels=("own_rms_norm",))
    torch.testing.assert_close(compiled(heads), norm(heads))
    for report in fixpass.last_reports():
        print(report)


if __name__ == "__main__":
    main()

"""A layer over a folded weight, compiled with prepack-linears, and how near it comes to eager."""

import torch
from torch import nn
from torch.nn.functional import linear


class Joined(nn.Module):
    """A layer over two concatenated weights, in a type of one's own, and what else reads them."""

    def __init__(self, use=linear, dtype=torch.float32):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(256, 128).to(dtype))
        self.up = nn.Parameter(torch.randn(512, 128).to(dtype))
        self.bias = nn.Parameter(torch.randn(768).to(dtype))
        self.use = use

    def forward(self, x):
        return self.use(x, torch.cat([self.gate, self.up]), self.bias)


@torch.no_grad()
def same(run, module, x):
    """One kernel sums a row in another order than the other: 128 products of normal values."""
    wanted = module(x)
    bound = 1e-4 if x.dtype == torch.float32 else 0.25
    torch.testing.assert_close(run(x), wanted, rtol=1e-2, atol=bound, check_stride=True)

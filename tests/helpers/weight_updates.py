"""Models with weights to fold, and every way in which people change weights.

An update takes a module and gives all of its parameters new values, each in its own way.
"""

import torch
from torch import nn
from torch.nn.functional import linear

from fixpass.testing import f32
from helpers import compiling

# Without the pass that hands products to another kernel, which rounds in another order.
EAGER = compiling.EAGER | {"disable": ("prepack-linears",)}


class Folds(nn.Module):
    """A weight that is transposed, one that is shuffled, and two that are concatenated."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(f32(512, 64))
        self.tiled = nn.Parameter(f32(512, 64))
        self.gate = nn.Parameter(f32(256, 64))
        self.up = nn.Parameter(f32(512, 64))

    def forward(self, x):
        tiles = self.tiled.view(32, 16, 4, 16).permute(0, 2, 1, 3)
        shuffled = tiles.contiguous().view(512, 64)
        joined = torch.cat([self.gate, self.up])
        return x @ self.turned.t().contiguous(), linear(x, shuffled), linear(x, joined)


class Reads(nn.Module):
    """`how(weight)` of one weight, and of a buffer where `of_buffer`."""

    def __init__(self, how, *shape, of_buffer=False, dtype=torch.float32):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(*(shape or (512, 64))).to(dtype))
        self.register_buffer("scale", torch.randn(*(shape or (512, 64))))
        self.of_buffer = of_buffer

    def forward(self, x):
        return self.how(self.scale if self.of_buffer else self.weight) * x.mean()


def compiled(module, **options):
    return compiling.compiled(module, **(EAGER | options))


@torch.no_grad()
def same(run, module, x):
    torch.testing.assert_close(run(x), module(x))


def fresh(module):
    """New values for the parameters of a module, by name; the same whatever their strides are."""
    return {n: torch.randn(p.shape, dtype=p.dtype) for n, p in module.named_parameters()}


def set_parameter(module, name, value):
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, value)


def by_copy(module):
    with torch.no_grad():
        for name, value in fresh(module).items():
            module.get_parameter(name).copy_(value)


def by_copy_in_inference_mode(module):
    with torch.inference_mode():
        for name, value in fresh(module).items():
            module.get_parameter(name).copy_(value)


def by_optimizer(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for name, value in fresh(module).items():
        module.get_parameter(name).grad = value
    optimizer.step()
    optimizer.zero_grad()


def by_fused_optimizer(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=1.0, fused=True)
    for name, value in fresh(module).items():
        module.get_parameter(name).grad = value
    optimizer.step()
    optimizer.zero_grad()


def by_load_state_dict(module):
    module.load_state_dict(fresh(module), strict=False)


def by_load_state_dict_assign(module):
    module.load_state_dict(fresh(module), strict=False, assign=True)


def by_swap_tensors(module):
    for name, value in fresh(module).items():
        torch.utils.swap_tensors(module.get_parameter(name), nn.Parameter(value))


def by_rebinding(module):
    for name, value in fresh(module).items():
        set_parameter(module, name, nn.Parameter(value))


def by_data_assignment(module):
    for name, value in fresh(module).items():
        module.get_parameter(name).data = value


def by_data_assignment_at_the_same_address(module):
    """The old memory is freed before the new one is taken, which is often at the same address."""
    for name, value in fresh(module).items():
        parameter = module.get_parameter(name)
        kept = value.numpy().copy()
        del value
        parameter.data = torch.empty(0)
        parameter.data = torch.empty(kept.shape)
        parameter.data.copy_(torch.from_numpy(kept))


def by_data_copy(module):
    for name, value in fresh(module).items():
        module.get_parameter(name).data.copy_(value)


def by_numpy(module):
    for name, value in fresh(module).items():
        module.get_parameter(name).detach().numpy()[:] = value.numpy()


COUNTED = {
    "copy_": by_copy,
    "copy_ in inference mode": by_copy_in_inference_mode,
    "an optimizer": by_optimizer,
    "a fused optimizer": by_fused_optimizer,
    "load_state_dict": by_load_state_dict,
    "load_state_dict with assign": by_load_state_dict_assign,
    "swap_tensors": by_swap_tensors,
    "a new parameter": by_rebinding,
    "new data": by_data_assignment,
    "new data at the same address": by_data_assignment_at_the_same_address,
}
"""Updates that torch counts, or that replace the object or its memory."""

UNCOUNTED = {".data.copy_": by_data_copy, "numpy": by_numpy}
"""Updates that nobody is told of."""

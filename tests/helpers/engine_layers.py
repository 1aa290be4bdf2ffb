"""A layer as engines have it: its weight has a class, a loader and a dimension of its own."""

import torch
from torch import nn

FP8 = torch.float8_e4m3fn


class Loadable(nn.Parameter):
    """A parameter like those of engines: a class of its own, read-only properties, a loader."""

    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, loader=None, output_dim=0):
        self._loader, self._output_dim = loader, output_dim

    @property
    def output_dim(self):
        return self._output_dim

    def load(self, values):
        assert self.data.shape == values.shape
        self.data.copy_(values)


def weights(seed, rows=32, columns=64, dtype=FP8):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def layer(values):
    module = nn.Module()
    module.register_parameter("weight", Loadable(values.clone(), loader="theirs"))
    return module

"""A model for tests of updates: plain, folded, packed and tied parameters, and a buffer."""

import torch
from torch import nn

from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.rebind import pack

MODES = ("buffered", "undo_log", "double_buffer")


def model_of(seed=0, folded=True):
    """Plain, shuffled, transposed, packed and tied parameters, and a buffer."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.plain = nn.Linear(64, 32)
    model.shuffled = nn.Linear(64, 32)
    model.turned = nn.Linear(64, 32)
    model.tied = nn.Linear(64, 32, bias=False)
    model.tied.weight = model.plain.weight
    model.q, model.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    model.register_buffer("steps", torch.tensor(seed))
    for name, param in model.named_parameters():
        param.mark = name
    if folded:
        set_layouts(model, {"shuffled.weight": "aiter_16x16", "turned.weight": "transposed"})
        pack([model.q.weight, model.k.weight])
    return model


def values(seed):
    return {
        name: value.clone() for name, value in model_of(seed, folded=False).state_dict().items()
    }


def holds(model, wanted):
    state = model.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)

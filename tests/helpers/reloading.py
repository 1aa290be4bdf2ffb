"""A small model with parameters and buffers, its checkpoints, and reloads of it, for tests."""

import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import Stacked
from fixpass.runtime.weights.parameter_layout import logical

MODES = ("buffered", "double_buffer", "undo_log")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def stacked(size):
    """A model whose only weight a checkpoint has in three parts, and the mapping that says so."""
    model = nn.ModuleDict({"qkv": nn.Linear(size, 3 * size, bias=False)}).requires_grad_(False)
    return model, Mapping(stacked=(Stacked("qkv", ("q", "k", "v")),))


def saved(folder, seed, shards=2, model=None):
    """A checkpoint of several files, and its tensors."""
    found = (model or model_of()).state_dict()
    torch.manual_seed(seed)
    state = {n: torch.randn(v.shape).to(v.dtype) for n, v in found.items()}
    names = list(state)
    folder.mkdir(exist_ok=True)
    for index in range(shards):
        save_file({n: state[n] for n in names[index::shards]}, folder / f"m-{index}.safetensors")
    return state


def holds(model, state):
    return all(torch.equal(logical(value), state[name]) for name, value in named(model))


def named(model):
    kept = model.state_dict().keys()
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [(name, value) for name, value in both if name in kept]


def reloaded(model, folder, mode="buffered", **options):
    return reload(model, folder, mode, progress=False, **options)

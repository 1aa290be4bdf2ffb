"""What ranks do in the tests of parameters' attributes; each function runs on every rank."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fixpass.sharding import fully_shard_model
from fixpass.weights import load
from helpers.sharding_workers import lost_marks, mark, mesh, model_of, tensor_parallel


def attributes_through_conversions(convert):
    """Attributes after `fully_shard_model` and a conversion of the model, then of one block."""
    model = model_of()
    mark(model)
    fully_shard_model(model, mesh())
    model.norm.weight.later = "set after sharding"
    model.norm.weight.mark = "changed after sharding"
    convert(model)
    convert(model.blocks[1])
    weight = model.norm.weight
    return lost_marks(model), vars(weight).get("later"), weight.mark, weight.dtype


class LoadedParameter(nn.Parameter):
    """An engine's parameter: its loader is a property of the class."""

    @property
    def weight_loader(self):
        return self._load


def loaders_before_tensor_parallelism(shards):
    """Loaders that are set first, then tensor parallelism, FSDP2 where `shards`, and `load`."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, called = model_of(1), []

    def own(name):
        def load_doubled(param, loaded):
            called.append(name)
            param.data.copy_(loaded * 2)

        return load_doubled

    for block in model.blocks:
        up = block.up.weight
        block.up.weight = LoadedParameter(up.detach(), requires_grad=False)
        block.up.weight._load = own("property")
        block.down.weight.weight_loader = own("attribute")
    mark(model)
    tensor_parallel(model, grid["tp"])
    if shards:
        fully_shard_model(model, grid["dp"])
    load(model, model_of().state_dict())
    twice = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}
    wrong = []
    for (name, param), want in zip(model.named_parameters(), model_of().parameters(), strict=True):
        got = param.full_tensor() if isinstance(param, DTensor) else param
        if not torch.equal(got, want * 2 if name in twice else want):
            wrong.append(name)
    return sorted(called), wrong, lost_marks(model)

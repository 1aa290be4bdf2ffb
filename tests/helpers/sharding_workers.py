"""What ranks do in the tests of sharded models; each function runs on every rank."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fixpass
from fixpass.sharding import entry_of, fully_shard_model
from fixpass.weights import GATE_UP, QKV, Mapping, load
from helpers import sharded_models


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def zero(model):
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()


def mark(model):
    """Set an attribute on every parameter, and say which ones."""
    for name, param in model.named_parameters():
        param.mark = name
        param.weight_scale_layout = {"of": name}


def lost_marks(model):
    return [name for name, param in model.named_parameters() if vars(param).get("mark") != name]


def load_sharded(name, folder):
    """Shard, load from disk and run a model: rule, units, lost attributes, and equality."""
    spec = sharded_models.SPECS[name]
    reference = sharded_models.build(name)
    model = sharded_models.build(name, seed=1)
    zero(model)
    mark(model)
    sharded = fully_shard_model(model, mesh())
    report = load(model, folder, mapping=spec.mapping)
    unsharded = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    wrong = [
        n
        for (n, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
        if not torch.equal(p.full_tensor(), q)
    ]
    equal = None
    if name in sharded_models.INPUTS or name in sharded_models.TRANSFORMERS:
        out = sharded_models.forward(name, model)
        equal = torch.equal(out, sharded_models.forward(name, reference))
    return {
        "rule": sharded.rule,
        "units": len(sharded.units),
        "lost": lost_marks(model),
        "unsharded": unsharded,
        "wrong": wrong,
        "skipped": len(report.skipped),
        "equal": equal,
    }


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(8, 24)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        return self.o_proj(torch.tanh(q) * k + v)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.attention = Attention()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attention(self.norm(x).to(x.dtype))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, x):
        return self.norm(x) * 2


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model().eval()


def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def unpacked(model):
    """The state dict with q, k and v by themselves, as checkpoints have them."""
    state = {}
    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = value.clone()
        else:
            state[name] = tensor
    return state


def tensor_parallel(model, tp):
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, tp, plan)
    return model


def load_on_two_dimensions(folder, dp, tp):
    """FSDP2 on one mesh dimension and tensor parallelism on the other, q, k and v packed on load."""
    grid = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(model_of(1), grid["tp"])
    zero(model)
    mark(model)
    sharded = fully_shard_model(model, grid["dp"])
    load(model, folder, mapping=Mapping(stacked=(QKV,)))
    want = model_of()
    wrong = [
        n
        for (n, p), q in zip(model.named_parameters(), want.parameters(), strict=True)
        if not torch.equal(p.full_tensor(), q)
    ]
    with torch.no_grad():
        difference = (model(batch()) - want(batch())).abs().max().item()
    return sharded.units, lost_marks(model), wrong, difference


def own_loaders_on_shards():
    """A tensor-parallel weight_loader of a parameter that FSDP2 sharded afterwards."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    block = model.blocks[0]
    block.gate_up_proj = nn.Linear(3, 8, bias=False)
    weight = block.gate_up_proj.weight
    weight.requires_grad_(False).zero_()

    def weight_loader(param, loaded, shard):
        # The second of two tensor-parallel ranks.
        param.data.narrow(0, 4 * shard, 4).copy_(loaded.narrow(0, 4, 4))

    weight.weight_loader = weight_loader
    fully_shard_model(model, mesh())
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    dist.broadcast(gate, 0)
    dist.broadcast(up, 0)
    stored = {"blocks.0.gate_proj.weight": gate, "blocks.0.up_proj.weight": up}
    load(model, stored, mapping=Mapping(stacked=(GATE_UP,)))
    now = block.gate_up_proj.weight
    return now is weight, torch.equal(now.full_tensor(), torch.cat([gate[4:], up[4:]]))


def load_after_a_forward(folder):
    """Parameters that a forward left gathered: what is written into them must not be lost."""
    model = model_of(1)
    fully_shard_model(model, mesh(), reshard_after_forward=False)
    with torch.no_grad():
        model(batch())
        gathered = not isinstance(model.norm.weight, DTensor)
        load(model, folder, mapping=Mapping(stacked=(QKV,)))
        return gathered, torch.equal(model(batch()), model_of()(batch()))


def load_of_a_sharded_state_dict():
    """A state dict of DTensors goes in shard by shard; one that is sharded otherwise is refused."""
    source, model = model_of(), model_of(1)
    fully_shard_model(source, mesh())
    fully_shard_model(model, mesh())
    load(model, source.state_dict())
    with torch.no_grad():
        equal = torch.equal(model(batch()), model_of()(batch()))
    try:
        load(model_of(1), source.state_dict())
    except fixpass.FixpassError as error:
        return equal, str(error)
    return equal, ""


def load_of_a_dcp_folder(folder):
    """Every rank writes its shards with DCP; the checkpoint is loaded into a model of one rank."""
    import torch.distributed.checkpoint as dcp

    source = model_of()
    fully_shard_model(source, mesh())
    dcp.save(source.state_dict(), checkpoint_id=folder)
    alone, sharded = model_of(1), model_of(1)
    fully_shard_model(sharded, mesh(), conditions=(entry_of("blocks"),))
    load(alone, Path(folder))
    load(sharded, Path(folder))
    with torch.no_grad():
        want = model_of()(batch())
        return torch.equal(alone(batch()), want), torch.equal(sharded(batch()), want)


def mixed_precision():
    """Norms keep float32 while the blocks compute in bfloat16; dtypes seen, and the output's."""
    model = model_of()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    seen = {}

    def note(name):
        def hook(module, args):
            seen[name] = (module.weight.dtype, args[0].dtype)

        return hook

    for name in ("blocks.0.norm", "blocks.0.up"):
        model.get_submodule(name).register_forward_pre_hook(note(name))
    sharded = fully_shard_model(model, mesh(), mp_policy=policy, keep_dtype=("norm",))
    with torch.no_grad():
        out = model(batch())
    return sharded.kept, seen, out.dtype


def other_methods():
    """A method that is no forward gathers parameters where it is registered."""
    model = model_of()
    fully_shard_model(model, mesh(), forward_methods=("encode",))
    with torch.no_grad():
        return torch.equal(model.encode(batch()), model_of().encode(batch()))


def compiled(kind):
    """A sharded or tensor-parallel model under backend="fixpass": the largest difference."""
    torch._dynamo.reset()
    model, x = model_of(), batch()
    with torch.no_grad():
        want = model(x)
        if kind == "fsdp":
            fully_shard_model(model, mesh())
        else:
            tensor_parallel(model, mesh())
        run = torch.compile(model, backend="fixpass")
        run(x)
        return (run(x) - want).abs().max().item(), len(fixpass.last_reports())

"""What other processes do in the tests of updates: ranks of a group, and a process that is killed."""

import os
import signal
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fixpass.runtime.weights import files
from fixpass.runtime.weights import update as updating
from fixpass.runtime.weights.derived import derive
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.update import update


def file_model(path):
    """A model whose weights lie in a file that outlives the process."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    size = 8 * 256 * 4
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    for index, layer in enumerate(model):
        data = torch.empty(0).set_(storage, index * 256, (16, 16), (16, 1))
        layer.weight = nn.Parameter(data, requires_grad=False)
    return model


def full(value):
    return {f"{index}.weight": torch.full((16, 16), float(value)) for index in range(8)}


def die_in_mid_commit(weights, state, mode):
    """Update to version 1, begin to write version 2, and be killed after half of the layers."""
    model = file_model(weights)
    files.MOST_PARTS = 1
    with update(model, mode, state_file=state) as tx:
        tx.load_state_dict(full(1))
    done, move = [], files.move

    def dying(*args):
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(args)
        move(*args)

    files.move = dying
    with update(model, mode, state_file=state, threads=1) as tx:
        tx.load_state_dict(full(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.up(x).relu())


def sharded(make=lambda: nn.Sequential(Block(), Block())):
    torch.manual_seed(0)
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def update_sharded(mode, way):
    """Update a model that FSDP2 sharded, just after a forward, when its weights are gathered."""
    model, torch_state = sharded(), {}
    for number in (1, 2):
        model(torch.ones(2, 16))
        torch.manual_seed(number)
        torch_state = {name: torch.randn(param.shape) for name, param in model.named_parameters()}
        ids = {name: id(param) for name, param in model.named_parameters()}
        given = torch_state
        if way == "sharded":
            given = {
                name: torch.distributed.tensor.distribute_tensor(
                    torch_state[name], param.device_mesh, param.placements
                )
                for name, param in model.named_parameters()
            }
        with update(model, mode) as tx:
            tx.load_state_dict(given)
        assert ids == {name: id(param) for name, param in model.named_parameters()}
    wrong = [
        name
        for name, param in model.named_parameters()
        if not torch.equal(param.full_tensor(), torch_state[name])
    ]
    plain = nn.Sequential(Block(), Block())
    plain.load_state_dict(torch_state)
    same = torch.equal(model(torch.ones(2, 16)), plain(torch.ones(2, 16)))
    return wrong, same, version(model)


class Whole(nn.Sequential):
    """Two blocks, and a parameter of the root's own, which stays gathered after a forward."""

    def __init__(self):
        super().__init__(Block(), Block())
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return super().forward(x) * self.scale


def reload_sharded(folder):
    """Reload a sharded model from files, each time after a forward; how often that was planned."""
    model, wrong, plans, make = sharded(Whole), [], [], updating.make_plan
    updating.make_plan = lambda *args, **kwargs: plans.append(1) or make(*args, **kwargs)
    for number in (1, 2, 3):
        before = model(torch.ones(2, 16)).detach()
        reload(model, f"{folder}/{number}", progress=False)
        state = load_file(f"{folder}/{number}/w.safetensors")
        wrong += [
            n for n, p in model.named_parameters() if not torch.equal(p.full_tensor(), state[n])
        ]
        plain = Whole()
        plain.load_state_dict(state)
        now = model(torch.ones(2, 16))
        wrong += (
            [number]
            if torch.equal(now, before) or not torch.equal(now, plain(torch.ones(2, 16)))
            else []
        )
    updating.make_plan = make
    return wrong, len(plans), version(model)


def refresh_sharded():
    """Whether declared tensors, a whole one and a sharded one, are right after sharded reloads."""
    model, right = sharded(), []
    derive(model[0], "sums", lambda weight: weight.full_tensor().sum(1), of=["up.weight"])
    derive(model[0], "twice", lambda weight: 2 * weight, of=["up.weight"])
    for seed in (1, 2):
        model(torch.ones(2, 16))
        torch.manual_seed(seed)
        new = {name: torch.randn(param.shape) for name, param in model.named_parameters()}
        reload(model, new, progress=False, on_stale="raise")
        weight = new["0.up.weight"]
        right.append(torch.equal(model[0].sums, weight.sum(1)))
        right.append(torch.equal(model[0].twice.full_tensor(), 2 * weight))
    return right


def write_plainly():
    """What becomes of a copy into a sharded parameter, and of a write into a gathered one."""
    model, said = sharded(), ""
    try:
        with torch.no_grad():
            model[0].up.weight.copy_(torch.ones(32, 16))
    except RuntimeError as error:
        said = str(error)
    model.unshard()
    model[0].unshard()
    with torch.no_grad():
        model[0].up.weight.fill_(7.0)
    model[0].reshard()
    lost = not bool((model[0].up.weight.full_tensor() == 7.0).any())
    return said, "lost" if lost else "kept"


def refuse_sharded():
    """What a sharded model says to a fold and to a second set of memory."""
    from fixpass.runtime.weights.parameter_layout import set_layout

    model, said = sharded(), []
    for work in (
        lambda: set_layout(model[0].up.weight, "aiter_16x16", "up"),
        lambda: _double(model),
    ):
        try:
            work()
        except ValueError as error:
            said.append(str(error))
    return said


def _double(model):
    with update(model, "double_buffer") as tx:
        tx.load_state_dict({n: torch.ones(p.shape) for n, p in model.named_parameters()})


if __name__ == "__main__":
    die_in_mid_commit(*sys.argv[1:])

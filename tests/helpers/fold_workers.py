"""What ranks do in the tests of folds in sharded models."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import linear

import fixpass
from fixpass import weights

OPTIONS = {"fold_weights": "cache", "lower": "eager", "strict": True}


class Joined(nn.Module):
    """Gate and up in one product, joined in each call."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(256, 256)) for _ in range(2))
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return self.down(linear(x, torch.cat([self.gate, self.up])))


def state(seed):
    torch.manual_seed(seed)
    return {
        "0.gate": torch.randn(256, 256),
        "0.up": torch.randn(256, 256),
        "0.down.weight": torch.randn(256, 512),
    }


def run_sharded(way):
    """A sharded model, compiled, over three updates: what was wrong, and what the pass said."""
    torch._dynamo.reset()
    model, plain, x = nn.Sequential(Joined()), nn.Sequential(Joined()), torch.ones(2, 256)
    model.load_state_dict(state(0))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if way == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model[0], mesh, {"down": ColwiseParallel(use_local_output=False)})
    run, wrong = torch.compile(model, backend="fixpass", options=OPTIONS), []
    before = len(fixpass.last_reports())
    with torch.no_grad():
        for seed in range(3):
            with weights.update(model) as tx:
                tx.load_state_dict(state(seed))
            plain.load_state_dict(state(seed))
            found = run(x)
            found = found.full_tensor() if way == "tp" else found
            if not torch.allclose(found, plain(x), rtol=1e-4, atol=1e-3):
                wrong.append(seed)
    reports = fixpass.last_reports()[before:]
    remarks = [remark for report in reports for remark in report.of_pass("fold-weights")]
    return wrong, sorted({(remark.kind, remark.text) for remark in remarks})

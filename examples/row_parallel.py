"""A row-parallel MLP on two ranks of one machine, its all-reduce in symmetric memory.

    torchrun --nproc-per-node 2 examples/row_parallel.py

The model knows nothing of symmetric memory: `parallelize_module` splits it, `torch.compile` with
the backend fixpass finds the matmul in front of the all-reduce and lets it write where all ranks
read. Prints what was decided and done, and that the result is the unsplit model's.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fixpass
import fixpass.symmetric_memory


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))  # type: ignore[no-any-return]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = MLP(256, 1024).requires_grad_(False)
    x = torch.randn(4, 256)
    want = model(x)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    got = torch.compile(model, backend="fixpass")(x)
    torch.testing.assert_close(got, want)

    context = fixpass.symmetric_memory.context(mesh)
    if dist.get_rank() == 0:
        print(context)
        for report in fixpass.last_reports():
            print(report)
        print(context.stats())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Row-parallel blocks of Llama on real ranks, for tests and the benchmark; see `ranks.py`.

transformers' own classes, split by torch's `parallelize_module`: column-parallel projections in
front, a row-parallel one behind, whose all-reduce is what fixpass is about.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRotaryEmbedding,
)

import fixpass
import fixpass.symmetric_memory as symmetric
from fixpass.runtime import linear

MLP = {"gate_proj": ColwiseParallel, "up_proj": ColwiseParallel, "down_proj": RowwiseParallel}
ATTENTION = {
    "q_proj": ColwiseParallel,
    "k_proj": ColwiseParallel,
    "v_proj": ColwiseParallel,
    "o_proj": RowwiseParallel,
}


def config_of(hidden_size):
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4 // 16 * 16,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )


class Attention(torch.nn.Module):
    """LlamaAttention with its rotary embedding, called as the MLP is."""

    def __init__(self, config):
        super().__init__()
        self.attention = LlamaAttention(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1])[None]
        return self.attention(x, self.rotary(x, positions), None)[0]


@cache
def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def build(part, hidden_size, dtype=torch.float32):
    """The block of this rank; the same weights whatever the number of ranks."""
    torch.manual_seed(0)
    config = config_of(hidden_size)
    if part == "mlp":
        block, plan = LlamaMLP(config), MLP
    else:
        block = Attention(config)
        plan = {f"attention.{name}": style for name, style in ATTENTION.items()}
    block = block.to(dtype).eval().requires_grad_(False)
    if dist.get_world_size() == 1:
        return block
    return parallelize_module(block, mesh(), {name: style() for name, style in plan.items()})


def tokens(hidden_size, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(1, count, hidden_size, generator=generator).to(dtype)


def run_block(part, backend, hidden_size, counts, dtype=torch.float32, dynamic=None):
    """Outputs for inputs of so many tokens, their strides, and what the pass said."""
    torch._dynamo.reset()
    run = torch.compile(build(part, hidden_size, dtype), backend=backend, dynamic=dynamic)
    with torch.no_grad():
        outputs = [run(tokens(hidden_size, count, dtype)) for count in counts]
    remarks = [
        str(remark)
        for report in (fixpass.last_reports() if backend == "fixpass" else ())
        for remark in report.remarks
        if remark.pass_name == "place-symmetric-memory"
    ]
    return [output.detach().clone() for output in outputs], [o.stride() for o in outputs], remarks


def few_rows(rows):
    """A row-parallel product of `rows` rows: all-reduced, and as two kernels compute the sum."""
    assert linear.unavailable() == ""
    context = symmetric.context()
    assert context.symmetric
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, 3000), torch.randn(2, 3000, 40)
    rank, group = dist.get_rank(), context.group.group_name
    got = torch.ops.fixpass.matmul_all_reduce(x[rank], weight[rank], None, 1, 1, "sum", group)
    by_kernel = [
        torch.ops.fixpass.skinny_linear(*pair, None) for pair in zip(x, weight, strict=True)
    ]
    return got, sum(by_kernel), sum(a @ b for a, b in zip(x, weight, strict=True))

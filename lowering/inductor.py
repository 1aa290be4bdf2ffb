"""How Inductor lowers our collectives: what feeds an all-reduce is allocated symmetric.

On CUDA and ROCm Inductor allocates the output of a producer of known size in symmetric memory, and
keeps the buffer. In all other cases the op takes any input. Nothing is lowered at import.
"""

import hashlib
import random
from functools import cache
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.comm_lowering import can_realize_as_comm_buffer, realize_as_comm_buffer
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V
from torch.distributed.distributed_c10d import GroupName
from torch.fx.experimental.symbolic_shapes import free_symbols


@cache
def register() -> None:
    """Tell Inductor about our collectives, once a process."""
    op = torch.ops.fixpass.all_reduce.default
    fallback = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def all_reduce(x: Any, reduce_op: str, group_name: str) -> Any:
        if x.get_device().type == "cuda" and not free_symbols(x.get_numel()):
            x = ir.ExternKernel.require_contiguous(x)
            if can_realize_as_comm_buffer(x, ir.CommBufferType.SYMM_MEM):
                realize_as_comm_buffer(x, ir.CommBufferType.SYMM_MEM, GroupName(group_name))
                _seed_allocation_ids()
        return fallback(x, reduce_op, group_name)


def _seed_allocation_ids() -> None:
    """Give the symmetric buffers of different graphs different identities.

    Inductor draws an identity at random. Dynamo resets the random state after every graph, so two
    graphs would draw the same identities. The seed is the text of the graph with shapes and dtypes,
    so that a graph always compiles to the same code.
    """
    graph = V.graph.graph
    tensors = [node.meta.get("val") for node in graph.nodes]
    layouts = [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors]
    text = f"{V.graph.graph_id} {V.graph.name} {graph} {layouts}"
    random.seed(hashlib.sha256(text.encode()).digest())

"""The collectives of PyTorch and of engines: the positions of their arguments.

Ops of engines are found by name; no engine is imported.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fixpass.passes.rewrite import Missed, is_call, sole_user
from fixpass.runtime.providers import op_exists, overload_of


@dataclass(frozen=True)
class Collective:
    """An all-reduce by name: the places of its group and of its operation (None: a sum).

    waits: its result is not there until `wait_tensor` gives it.
    """

    name: str
    group: int
    op: int | None = None
    waits: bool = False

    @staticmethod
    def of(node: fx.Node) -> "Collective":
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        return next(each for each in COLLECTIVES if each.name == target._schema.name)

    def reduce_op(self, node: fx.Node) -> str:
        return "sum" if self.op is None else str(node.args[self.op]).lower()

    def result(self, node: fx.Node) -> fx.Node | Missed:
        """The node whose value is the reduced tensor."""
        if not self.waits:
            return node
        waiting = sole_user(node)
        if waiting is None or not is_call(waiting, torch.ops._c10d_functional.wait_tensor.default):
            return Missed("its result is not waited for in one place")
        return waiting


COLLECTIVES: tuple[Collective, ...] = (
    Collective("_c10d_functional::all_reduce", group=2, op=1, waits=True),
    Collective("vllm::all_reduce", group=1),
    Collective("sglang::outplace_all_reduce", group=1),
)

# Collectives of sequence parallelism, and ops that the pass cannot replace, each with the reason.
LEFT_ALONE: dict[str, str] = {
    "_c10d_functional::reduce_scatter_tensor": (
        "a reduce-scatter leaves each rank a part: it stays with the process group"
    ),
    "_c10d_functional::all_gather_into_tensor": (
        "an all-gather sums nothing: it stays with the process group"
    ),
    "_c10d_functional::all_reduce_coalesced": (
        "several tensors reduced at once have no one buffer: it stays with the process group"
    ),
    "vllm::reduce_scatter": "a reduce-scatter leaves each rank a part: it stays with the engine",
    "vllm::all_gather": "an all-gather sums nothing: it stays with the engine",
    "sglang::inplace_all_reduce": "it writes into its argument: it stays with the engine",
}


def find_overload(name: str) -> torch._ops.OpOverload | None:
    """The default overload of `namespace::op`, or None where no library has registered it."""
    return overload_of(name) if op_exists(name) else None

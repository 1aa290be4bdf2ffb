"""Makes vLLM's all-reduce through shared memory on CPU, which writes into its argument, functional.

The pass runs on Dynamo's graph. Only groups with symmetric memory are rewritten, to the functional
all-reduce that `place-symmetric-memory` knows. Other groups keep vLLM's op.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from vllm.distributed import parallel_state

from fixpass.passes.base import Pass, PassResult
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.runtime.providers import op_exists, overload_of
from fixpass.runtime.symmetric_memory.process_group import SUMMED

SHM = "_C::shm_allreduce"


@dataclass(frozen=True)
class FunctionalizeShmAllReduce(Pass):
    """`_C::shm_allreduce(handle, x)` to an all-reduce of the handle's group that returns its sum.

    place: the pass that will put the all-reduce into symmetric memory; it knows the groups.
    """

    name: ClassVar[str] = "functionalize-shm-all-reduce"

    place: PlaceSymmetricMemory

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        if not op_exists(SHM):
            return
        names = group_names()
        ops = (overload_of(SHM), overload_of(SHM).overloadpacket)
        for node in [node for node in graph.nodes if node.target in ops]:
            handle, x = node.args[:2]
            why = self._why_not(names.get(handle), node, x)
            if why:
                result.missed(node, f"{SHM} stays: {why}")
            elif result.take_fuel():
                _replace(graph, node, x, names[handle])
                result.changed = True

    def _why_not(self, name: str | None, node: fx.Node, x: fx.Node) -> str:
        if name is None:
            return "no group of vLLM's has its handle"
        val = x.meta.get("example_value")
        if val is None or val.dtype not in SUMMED:
            return "only float32, bf16 and fp16 are summed in symmetric memory"
        alias = next(_read_through_alias(node, x), None)
        if alias is not None:
            return f"{alias.name} shares the memory it writes to and is read behind it"
        decision = self.place.decide(name)
        return "" if decision else decision.reason


def group_names() -> dict[int, str]:
    """The c10d names of vLLM's groups by the handles of their shared memory."""
    names = {}
    for reference in parallel_state._groups.values():
        coordinator: Any = reference()
        if coordinator is not None and _has_shm(coordinator.device_communicator):
            handle = coordinator.device_communicator.dist_module.handle
            names[handle] = coordinator.device_group.group_name
    return names


def _has_shm(communicator: Any) -> bool:
    from vllm.distributed.device_communicators import cpu_communicator as cpu

    if not isinstance(communicator, cpu.CpuCommunicator):
        return False
    return isinstance(communicator.dist_module, cpu._CPUSHMDistributed)


def _read_through_alias(call: fx.Node, x: fx.Node) -> Iterator[fx.Node]:
    """Nodes other than x that hold x's memory, and are read behind the call or by the caller."""
    memory = _memory(x)
    for node in call.graph.nodes:
        if node is call:
            return
        if _memory(node) != memory or memory is None:
            continue
        is_callers = node.op in ("placeholder", "get_attr")
        if is_callers or (node is not x and any(call < user for user in node.users)):
            yield node


def _memory(node: fx.Node) -> int | None:
    val = node.meta.get("example_value")
    return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None


def _replace(graph: fx.Graph, call: fx.Node, x: fx.Node, name: str) -> None:
    functional = torch.ops._c10d_functional
    with graph.inserting_before(call):
        pending = graph.call_function(functional.all_reduce.default, (x, "sum", name))
        total = graph.call_function(functional.wait_tensor.default, (pending,))
    for node in (pending, total):
        node.meta = {**x.meta}
    x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not pending and call < user)
    graph.erase_node(call)

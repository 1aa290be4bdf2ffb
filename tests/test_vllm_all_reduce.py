"""All-reduces of vLLM's own shared memory, which write into their argument, become functional.

The op, the group and its handle are stand-ins; tests/engines sums with the real ones.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from fixpass import Pipeline
from fixpass.lowering.target import CPU
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Policy
from helpers import vllm_standin


def shm_graph(read_base=False):
    """x -> a view -> vLLM's all-reduce, which writes into it -> two readers."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(torch.add, (x, x))
    view = graph.call_method("view", (total, 2, 4))
    reduce = graph.call_function(torch.ops._C.shm_allreduce.default, (7, view))
    reader = graph.call_function(torch.mul, (view, 2))
    graph.output((reader, total if read_base else view))
    values = [torch.ones(8), torch.ones(8)]
    for node, value in zip((x, total), values, strict=True):
        node.meta["example_value"] = value
    view.meta["example_value"] = values[1].view(2, 4)
    return graph, reduce


@pytest.fixture
def shm(tmp_path, monkeypatch):
    with vllm_standin.loaded(tmp_path, monkeypatch):
        yield from step_of_group_3()


def step_of_group_3():
    """The pass, while vLLM has a group "3" whose shared memory has the handle 7."""
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    from fixpass.integrations.vllm.shm_all_reduce import FunctionalizeShmAllReduce

    library = torch.library.Library("_C", "FRAGMENT")
    library.define("shm_allreduce(int handle, Tensor(a!) data) -> ()")
    coordinator = SimpleNamespace(
        device_communicator=CpuCommunicator(7), device_group=SimpleNamespace(group_name="3")
    )
    parallel_state._groups["tp:0"] = lambda: coordinator
    place = PlaceSymmetricMemory(CPU, describe=lambda name, device: GroupFacts(name, 2))
    yield FunctionalizeShmAllReduce(place)
    library._destroy()


def run(step, graph):
    return Pipeline((step,), strict=True).run(graph)


def test_an_all_reduce_that_writes_into_its_argument_becomes_one_that_returns_its_sum(shm):
    graph, _ = shm_graph()
    assert run(shm, graph).remarks == ()
    graph.lint()
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert calls[1:3] == [
        "_c10d_functional.all_reduce.default",
        "_c10d_functional.wait_tensor.default",
    ]
    (waited,) = graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.wait_tensor.default
    )
    assert waited.args[0].args[1:] == ("sum", "3")
    reader, second = graph.output_node().args[0]
    assert reader.args[0] is waited
    assert second is waited


def test_an_all_reduce_whose_memory_is_read_by_another_name_stays(shm):
    graph, reduce = shm_graph(read_base=True)
    (remark,) = run(shm, graph).remarks
    assert remark.text == (
        "_C::shm_allreduce stays: add shares the memory it writes to and is read behind it"
    )
    assert reduce in graph.nodes


def test_an_all_reduce_of_a_group_without_symmetric_memory_stays(shm):
    unknown = replace(
        shm.place, describe=lambda name, device: GroupFacts(name, 2, obstacle="no room")
    )
    for place, reason in (
        (unknown, "group '3' has no symmetric memory: no room"),
        (
            replace(shm.place, policy=Policy(enabled=False), describe=None),
            "symmetric memory is off",
        ),
    ):
        graph, reduce = shm_graph()
        (remark,) = run(replace(shm, place=place), graph).remarks
        assert remark.text == f"_C::shm_allreduce stays: {reason}"
        assert reduce in graph.nodes


def test_an_all_reduce_of_whole_numbers_stays(shm):
    graph, reduce = shm_graph()
    reduce.args[1].meta["example_value"] = torch.ones(2, 4, dtype=torch.int32)
    (remark,) = run(shm, graph).remarks
    assert remark.text.endswith("only float32, bf16 and fp16 are summed in symmetric memory")


def test_a_handle_that_no_group_has_stays(shm):
    graph, reduce = shm_graph()
    reduce.update_arg(0, 8)
    (remark,) = run(shm, graph).remarks
    assert remark.text == "_C::shm_allreduce stays: no group of vLLM's has its handle"

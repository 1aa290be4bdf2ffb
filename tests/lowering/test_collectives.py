"""On CUDA, Inductor allocates what feeds an all-reduce in symmetric memory: seen in its code.

No device is needed: the graph is traced on fake tensors with a fake process group, and Inductor is
told of a GPU that is not there. The code is looked at, never run. Nothing here is a
kernel of Triton, which would ask for a driver.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.source import ConstantSource
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

from fixpass import Pipeline
from fixpass.lowering.inductor import register
from fixpass.lowering.target import target_named
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Policy

SYMMETRIC = "empty_strided_p2p("


@pytest.fixture(autouse=True)
def absent_gpu(monkeypatch):
    properties = SimpleNamespace(
        major=9,
        minor=0,
        name="absent",
        multi_processor_count=100,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",
    )
    interface = "torch._dynamo.device_interface.CudaInterface"
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: properties)
    monkeypatch.setattr(f"{interface}.get_device_properties", lambda *_: properties)
    monkeypatch.setattr(f"{interface}.get_compute_capability", lambda *_: 90)
    monkeypatch.setattr("torch._inductor.utils.is_big_gpu", lambda *_: False)
    monkeypatch.setattr("torch._inductor.scheduler.has_triton", lambda *_: True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    DeviceProperties.create.cache_clear()
    dist.destroy_process_group()


def reduce(x):
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x, "sum", "0"))


def row_parallel(x, w):
    return reduce(torch.mm(x, w))


def code_of(fn, *shapes, dynamic=False, dtype=torch.bfloat16):
    """The code that Inductor writes for CUDA after the pass, and the pass's remarks."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    if dynamic:
        symbol = shape_env.create_symbol(shapes[0][0], source=ConstantSource("rows"))
        rows = shape_env.create_symintnode(symbol, hint=shapes[0][0])
        shapes = ((rows, *shapes[0][1:]), *shapes[1:])
    with mode:
        inputs = [torch.empty(shape, device="cuda:0", dtype=dtype) for shape in shapes]
    gm = make_fx(fn, tracing_mode="symbolic")(*inputs)
    describe = lambda name, device_type: GroupFacts(name, 2)  # noqa: E731
    step = PlaceSymmetricMemory(target_named("cuda:sm_90"), Policy(), "", describe)
    report = Pipeline((step,), strict=True).run(gm.graph)
    gm.recompile()
    register()
    graph = GraphLowering(gm, shape_env=shape_env)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        code = graph.codegen()[0].value
    return code, "\n".join(str(remark) for remark in report.remarks)


def test_the_output_of_a_matmul_is_allocated_in_the_memory_of_its_group():
    code, report = code_of(row_parallel, (64, 32), (32, 128))
    (allocation,) = [line for line in code.splitlines() if SYMMETRIC in line]
    name, call = allocation.split("=", 1)
    assert "(64, 128), (128, 1), torch.bfloat16" in call
    assert 'group_name="0"' in call
    assert f"extern_kernels.mm(x_1, w_1, out={name.strip()})" in code
    assert f"torch.ops.fixpass.all_reduce.default({name.strip()}, 'sum', '0')" in code
    assert "symmetric memory of group '0'" in report
    assert "outside of CUDA-graph capture" in report


def identities(fn, *shapes, dtype=torch.bfloat16):
    code, _ = code_of(fn, *shapes, dtype=dtype)
    lines = [line for line in code.splitlines() if SYMMETRIC in line]
    return [line.partition("alloc_id=")[2] for line in lines]


def test_graphs_of_one_text_with_other_shapes_or_dtypes_have_other_identities():
    found = [
        identities(row_parallel, (64, 32), (32, 128)),
        identities(row_parallel, (64, 64), (64, 128)),
        identities(row_parallel, (8, 32), (32, 128)),
        identities(row_parallel, (64, 32), (32, 128), dtype=torch.float32),
    ]
    assert len({each for (each,) in found}) == 4


def test_two_buffers_have_two_identities_and_one_graph_gives_one_code():
    def twice(x, w):
        return reduce(x @ w), reduce(w @ x)

    first, second = (identities(twice, (8, 16), (16, 8)) for _ in range(2))
    assert len(set(first)) == 2
    assert all(first)
    assert first == second


def test_what_has_a_symbolic_size_is_copied_by_the_op():
    code, report = code_of(row_parallel, (64, 32), (32, 128), dynamic=True)
    assert SYMMETRIC not in code
    assert "torch.ops.fixpass.all_reduce.default(" in code
    assert "of symbolic size, is copied" in report

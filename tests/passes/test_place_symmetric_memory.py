"""place-symmetric-memory: a matmul writes where the all-reduce behind it reads, or says why not."""

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch.testing._internal.distributed.fake_pg import FakeStore

from fixpass import Pipeline
from fixpass.lowering.target import CPU
from fixpass.passes.canonicalize_norms import CanonicalizeNorms
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Policy
from fixpass.testing import f32, text, trace


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def on_one_host(name, device_type):
    return GroupFacts(name, 2)


ON = Policy()


def place(fn, *args, policy=ON, describe=on_one_host, **kwargs):
    gm = trace(fn, *args, **kwargs)
    step = PlaceSymmetricMemory(CPU, policy, "", describe)
    report = Pipeline((step,), verify=True, strict=True).run(gm.graph)
    return gm, "".join(f"{remark}\n" for remark in report.remarks)


def reduce(x, op="sum"):
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x, op, "0"))


def test_a_matmul_and_its_all_reduce_become_one_op_with_dynamic_shapes_too():
    gm, report = place(lambda x, w: reduce(x @ w), f32(5, 8), f32(8, 4), dynamic=True)
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert torch.ops.fixpass.matmul_all_reduce.default in targets
    assert torch.ops.aten.mm.default not in targets
    assert "into symmetric memory of group '0'" in report


def test_a_product_with_another_reader_is_not_made_twice():
    def twice(x, w):
        y = x @ w
        return reduce(y), y

    gm, report = place(twice, f32(5, 8), f32(8, 4))
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 1
    assert "f32[5, 4] of mm is copied into symmetric memory" in report


def test_a_bias_added_behind_views_joins_the_matmul():
    gm, report = place(lambda x, w, b: reduce((x @ w) + b), f32(2, 3, 8), f32(8, 4), f32(4))
    calls = gm.graph.find_nodes(
        op="call_function", target=torch.ops.fixpass.matmul_all_reduce.default
    )
    assert [str(call.args[2]) for call in calls] == ["b"]
    assert "mm writes f32[6, 4]" in report


@pytest.mark.parametrize(
    ("fn", "policy", "describe", "why"),
    [
        (lambda x: reduce(x, "max"), Policy(), on_one_host, "only sums"),
        (lambda x: reduce(x.long()), Policy(), on_one_host, "is not summed in symmetric memory"),
        (reduce, Policy(enabled=False), on_one_host, "symmetric memory is off"),
        (reduce, Policy(dp_attention=True), on_one_host, "different numbers of tokens"),
        (reduce, Policy(), lambda n, d: GroupFacts(n, 4, num_hosts=2), "on 2 hosts"),
        (reduce, Policy(), lambda n, d: GroupFacts(n, 2, obstacle="no room"), "no room"),
    ],
)
def test_what_is_left_alone_says_why(fn, policy, describe, why):
    gm, report = place(fn, f32(4), policy=policy, describe=describe)
    assert report.startswith("missed")
    assert why in report
    assert "fixpass" not in text(gm.graph)


def test_a_residual_and_a_norm_behind_the_all_reduce_stay_one_norm():
    def block(x, w, residual, gain):
        total = reduce(x @ w) + residual
        return total, torch.nn.functional.rms_norm(total, (4,), gain, 1e-6)

    gm = trace(block, f32(5, 8), f32(8, 4), f32(5, 4), f32(4))
    steps = (CanonicalizeNorms(), PlaceSymmetricMemory(CPU, ON, "", on_one_host))
    Pipeline(steps, verify=True, strict=True).run(gm.graph)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(x: f32[5, 8], w: f32[8, 4], residual: f32[5, 4], gain: f32[4])
    matmul_all_reduce = fixpass.matmul_all_reduce(x, w, None, 1, 1, 'sum', '0')                          f32[5, 4]
    add_rms_norm = fixpass.add_rms_norm(matmul_all_reduce, residual, gain, None, 9.999999974752427e-07)  (f32[5, 4], f32[5, 4])
    getitem_1 = getitem(add_rms_norm, 0)                                                                 f32[5, 4]
    getitem = getitem(add_rms_norm, 1)                                                                   f32[5, 4]
    return getitem, getitem_1
""",
    )


def test_the_neighbours_of_sequence_parallelism_are_left_with_a_reason():
    functional = torch.ops._c10d_functional

    def scattered(x, w):
        return functional.wait_tensor(functional.reduce_scatter_tensor(x @ w, "sum", 2, "0"))

    def gathered(x):
        return functional.wait_tensor(functional.all_gather_into_tensor(x, 2, "0"))

    for fn, inputs, why in (
        (scattered, (f32(4, 8), f32(8, 4)), "leaves each rank a part"),
        (gathered, (f32(4, 8),), "sums nothing"),
    ):
        gm, report = place(fn, *inputs)
        assert report.startswith("missed")
        assert why in report
        assert "fixpass" not in text(gm.graph)


def test_an_opaque_gemm_is_called_where_its_result_is_allocated_in_the_groups_memory():
    @torch.library.custom_op("fixpass_tests::gemm", mutates_args=())
    def gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    gemm.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
    large, small = f32(512, 8), f32(4, 8)
    gm, report = place(lambda x, w: reduce(torch.ops.fixpass_tests.gemm(x, w)), large, f32(8, 256))
    assert "is called where f32[512, 256] is allocated in symmetric memory" in report
    assert "fixpass.call_all_reduce" in text(gm.graph)
    # What fits a slot is copied there in any case.
    gm, report = place(lambda x, w: reduce(torch.ops.fixpass_tests.gemm(x, w)), small, f32(8, 4))
    assert "is copied into symmetric memory" in report


def test_the_snapshot_of_a_matmul():
    gm, _ = place(lambda x, w: reduce(x @ w), f32(5, 8), f32(8, 4))
    assert_expected_inline(
        text(gm.graph),
        """\
graph(x: f32[5, 8], w: f32[8, 4])
    matmul_all_reduce = fixpass.matmul_all_reduce(x, w, None, 1, 1, 'sum', '0')  f32[5, 4]
    return matmul_all_reduce
""",
    )

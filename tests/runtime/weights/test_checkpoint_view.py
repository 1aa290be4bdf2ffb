"""checkpoint_layout: any loader works on a parameter with a layout as on a plain one, again and again."""

import threading
from contextlib import suppress

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.layouts import NAMED, Alias
from fixpass.runtime.weights.parameter_layout import logical, set_layout
from helpers.folding import REFERENCES, aiter, equal, parameter

LAYOUTS = [layout.name for layout in NAMED if not isinstance(layout.steps[0], Alias)]


def column_parallel(param, loaded, rank=0, ranks=1):
    """An engine's loader: the slice of this rank along output_dim."""
    size = loaded.shape[param.output_dim] // ranks
    loaded = loaded.narrow(param.output_dim, rank * size, size)
    assert param.data.shape == loaded.shape
    param.data.copy_(loaded)


def row_parallel(param, loaded, rank=0, ranks=2):
    size = param.data.shape[param.input_dim]
    param.data.copy_(loaded.narrow(param.input_dim, rank * size, size))


def merged(param, loaded, shard, sizes):
    """q, k, v or gate, up: each into its own rows."""
    start = sum(sizes[:shard])
    target = param.data.narrow(param.output_dim, start, sizes[shard])
    assert target.shape == loaded.shape
    target.copy_(loaded)


def loadable(*shape, dtype=torch.bfloat16):
    param = parameter(*shape, dtype=dtype)
    param.output_dim, param.input_dim = 0, 1
    return param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loader_works_three_times_and_memory_and_attributes_stay(layout):
    param = loadable(64, 128, dtype=torch.uint8)
    pointer, attributes = param.data_ptr(), dict(vars(param))
    set_layout(param, layout)
    shape, stride = param.shape, param.stride()
    for seed in range(3):
        loaded = parameter(64, 128, dtype=torch.uint8, seed=seed + 1).data
        with checkpoint_layout([param]):
            assert param.shape == (64, 128)
            column_parallel(param, loaded)
            assert torch.equal(param, loaded)
        assert equal(param, REFERENCES[layout](loaded))
        assert (param.shape, param.stride(), param.data_ptr()) == (shape, stride, pointer)
        assert vars(param) == attributes


def test_a_square_transposed_parameter_loads_what_the_checkpoint_means():
    """With its dims merely swapped a loader of a square one writes the transpose, in silence."""
    param = loadable(8, 8, dtype=torch.float32)
    set_layout(param, "transposed_dense")
    whole = torch.arange(8.0 * 16).view(8, 16)
    with checkpoint_layout([param]):
        row_parallel(param, whole, rank=1)
    assert torch.equal(param, whole[:, 8:].t())


def test_a_transposed_parameter_loads_the_slice_of_its_rank():
    """N=8, K=16: what synced dims got wrong without a word."""
    param = loadable(8, 16, dtype=torch.float32)
    set_layout(param, "transposed_dense")
    whole = torch.arange(16.0 * 16).view(16, 16)
    for rank in (0, 1, 0):
        with checkpoint_layout([param]):
            column_parallel(param, whole, rank=rank, ranks=2)
        assert torch.equal(param, whole[8 * rank : 8 * rank + 8].t())


@pytest.mark.parametrize("layout", ["aiter_16x16", "gate_up_interleaved_16x16", "column_major"])
@pytest.mark.parametrize("sizes", [(32, 16, 16), (40, 12, 12), (1, 62, 1)])
def test_shards_load_one_by_one_where_they_lie_in_bands_and_where_they_do_not(layout, sizes):
    param, loaded = loadable(64, 128), parameter(64, 128, seed=1).data
    set_layout(param, layout)
    for shard in (2, 0, 1):
        with checkpoint_layout([param]):
            merged(param, loaded.split(sizes)[shard], shard, sizes)
    assert equal(param, REFERENCES[layout](loaded))


def test_reloading_one_expert_leaves_the_others_right():
    param, loaded = parameter(4, 64, 128), parameter(4, 64, 128, seed=1).data
    before = param.detach().clone()
    set_layout(param, "aiter_16x16")
    with checkpoint_layout([param]):
        param.data[0].copy_(loaded[0])
    assert equal(param, aiter(torch.cat([loaded[:1], before[1:]])))


STEPS = {
    "narrow": lambda p, w: p.narrow(0, 5, 9).copy_(w[5:14]),
    "chunk": lambda p, w: p.chunk(3, 1)[1].copy_(w.chunk(3, 1)[1]),
    "split": lambda p, w: p.split([10, 22])[1].copy_(w[10:]),
    "index": lambda p, w: p.__setitem__(3, w[3]),
    "steps": lambda p, w: p.__setitem__((slice(1, None, 3), slice(None, None, 2)), w[1::3, ::2]),
    "fancy": lambda p, w: p.__setitem__(torch.tensor([3, 7]), w[[3, 7]]),
    "transposed": lambda p, w: p.t().copy_(w.t()),
    "view": lambda p, w: p.view(2, 16, 8, 8).select(0, 1).copy_(w.view(2, 16, 8, 8)[1]),
    "flat": lambda p, w: p.view(-1)[100:200].copy_(w.reshape(-1)[100:200]),
    "permuted": lambda p, w: (
        p.view(4, 8, 64).permute(1, 0, 2).copy_(w.view(4, 8, 64).permute(1, 0, 2))
    ),
    "broadcast": lambda p, w: p.copy_(w[:1]),
    "other dtype": lambda p, w: p.copy_(w.double()),
    "strided values": lambda p, w: p.copy_(w.t().contiguous().t()),
    "fill": lambda p, w: p[2:4].fill_(3.0),
    "zero": lambda p, w: p[:, 7].zero_(),
    "add": lambda p, w: p.add_(w, alpha=2.0),
    "within": lambda p, w: p[:8].copy_(p[8:16]),
    "masked": lambda p, w: p.masked_fill_(w > 0, 1.0),
    "index_copy": lambda p, w: p.index_copy_(0, torch.tensor([1, 30]), w[:2]),
    "diagonal": lambda p, w: p.diagonal().copy_(w.diagonal()),
    "raw bits": lambda p, w: p.view(torch.int32).copy_(w.view(torch.int32)),
}


@pytest.mark.parametrize(
    ("step", "layout"),
    [
        (step, layout)
        for step in STEPS
        for layout in LAYOUTS
        if (step, layout) not in (("flat", "column_major"), ("flat", "transposed_dense"))
    ],
)
def test_every_write_lands_where_it_means(step, layout):
    plain, values = torch.arange(2048.0).view(32, 64), -torch.arange(2048.0).view(32, 64) - 9
    param = nn.Parameter(plain.clone())
    set_layout(param, layout)
    STEPS[step](plain, values)
    with checkpoint_layout([param]):
        STEPS[step](param.data, values)
        assert torch.equal(param, plain)
        assert param.data.sum() == plain.sum()
    assert torch.equal(logical(param), plain)


@pytest.mark.parametrize("layout", ["column_major", "transposed_dense"])
def test_a_view_that_strides_cannot_say_is_refused_by_torch(layout):
    param = nn.Parameter(torch.randn(32, 64))
    set_layout(param, layout)
    with (
        pytest.raises(RuntimeError, match="view size is not compatible"),
        checkpoint_layout([param]),
    ):
        param.data.view(-1)


def test_writes_through_the_parameter_itself_land_too():
    param, values = nn.Parameter(torch.randn(32, 64)), torch.randn(32, 64)
    set_layout(param, "aiter_16x16")
    with torch.no_grad(), checkpoint_layout([param]):
        param.copy_(values)
        param[3:5] = 1.0
    values[3:5] = 1.0
    assert torch.equal(logical(param), values)


def test_load_state_dict_of_a_module_works_in_the_checkpoint_layout():
    source, model = nn.Linear(64, 32), nn.Linear(64, 32)
    set_layout(model.weight, "aiter_16x16")
    with checkpoint_layout(model.parameters()):
        model.load_state_dict(source.state_dict())
        assert torch.equal(model.state_dict()["weight"], source.weight)
    assert torch.equal(model.weight, aiter(source.weight.detach()))


def test_data_that_a_loader_puts_in_place_is_copied_into_the_memory_that_stays():
    param, values = parameter(32, 64), parameter(32, 64, seed=1).data
    set_layout(param, "aiter_16x16")
    pointer = param.data_ptr()
    with checkpoint_layout([param]):
        param.data = values
    assert equal(param, aiter(values))
    assert param.data_ptr() == pointer


def test_data_of_another_shape_put_in_place_is_refused_and_the_values_stay():
    param = parameter(32, 64)
    set_layout(param, "aiter_16x16")
    before = param.detach().clone()
    with (
        pytest.raises(
            LayoutError,
            match=r"a parameter of \(32, 64\) with layout aiter_16x16 data of shape \(8, 8\)",
        ),
        checkpoint_layout([param]),
    ):
        param.data = torch.zeros(8, 8, dtype=torch.bfloat16)
    assert equal(param, before)


def test_the_kernels_layout_comes_back_when_a_loader_raises():
    param, values = parameter(32, 64), parameter(32, 64, seed=1).data
    set_layout(param, "transposed")
    with suppress(KeyError), checkpoint_layout([param]):
        param.data[:16].copy_(values[:16])
        raise KeyError
    assert param.shape == (64, 32)
    assert equal(logical(param)[:16], values[:16])


def test_a_view_of_another_element_size_is_refused():
    param = parameter(32, 64)
    set_layout(param, "aiter_16x16")
    with pytest.raises(LayoutError, match="of another size"), checkpoint_layout([param]):
        param.data.view(torch.uint8).copy_(torch.zeros(32, 128, dtype=torch.uint8))


def test_padding_is_not_written_by_a_load():
    from fixpass.runtime.weights.layouts import Pad, WeightLayout

    param, values = nn.Parameter(torch.randn(19, 40)), torch.randn(19, 40)
    set_layout(param, WeightLayout("padded", (Pad((16, 32), value=2.0), *NAMED[0].steps)))
    with checkpoint_layout([param]):
        param.data.copy_(values)
        param.data.fill_(5.0)
    wanted = torch.full((32, 64), 2.0)
    wanted[:19, :40] = 5.0
    assert torch.equal(param, aiter(wanted))


def test_other_threads_are_not_redirected():
    param = parameter(32, 64)
    set_layout(param, "aiter_16x16")
    arranged, seen = param.detach().clone(), []
    with checkpoint_layout([param]):
        thread = threading.Thread(target=lambda: seen.append(param.detach().clone()))
        thread.start()
        thread.join()
    assert equal(seen[0], arranged)


def test_autograd_is_told_that_the_values_changed():
    param = nn.Parameter(torch.randn(32, 64))
    set_layout(param, "aiter_16x16")
    before = param._version
    with checkpoint_layout([param]):
        param.data.copy_(torch.zeros(32, 64))
    assert param._version > before

"""Copies of cells in C++: what torch would copy, bit for bit, in any number of threads, or no copy."""

import random

import pytest
import torch
from torch import nn

from fixpass.runtime.extension import Extension
from fixpass.runtime.weights import tile_copy
from fixpass.runtime.weights.parameter_layout import logical, reset_layout, set_layout
from fixpass.runtime.weights.tile_copy import copy_tiles, permute_blocks

needs_compiler = pytest.mark.skipif(tile_copy._library() is None, reason="no C++ compiler here")


@pytest.fixture(params=[1, 2, 3])
def _threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.fixture
def _any_size(monkeypatch):
    monkeypatch.setattr(tile_copy, "MIN_BYTES", 0)


def cells(*shape):
    """Random bits, among them NaN."""
    raw = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    return raw.view(torch.complex128).view(shape)


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def two_orders(chance):
    """A view of dense memory, and another of other memory with its dimensions in another order."""
    shape = [chance.choice((1, 2, 3, 4, 5, 16, 33)) for _ in range(chance.randint(2, 5))]
    order = list(range(len(shape)))
    chance.shuffle(order)
    source = cells(*(shape[dim] + chance.choice((0, 0, 3)) for dim in order))
    source = source[tuple(slice(0, shape[dim]) for dim in order)]
    return cells(*shape), source.permute([order.index(dim) for dim in range(len(shape))])


@needs_compiler
@pytest.mark.usefixtures("_threads", "_any_size")
@pytest.mark.parametrize("seed", range(40))
def test_it_copies_what_torch_copies(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    out, source = two_orders(chance)
    before, wanted = out.clone(), out.clone().copy_(source)
    version = out._version
    done = copy_tiles(out, source)
    assert torch.equal(bits(out), bits(wanted if done else before))
    assert (out._version > version) == done


@needs_compiler
@pytest.mark.usefixtures("_threads", "_any_size")
def test_it_is_for_two_dimensions_that_change_places():
    for shape in ((16, 33), (5, 16, 4), (2, 3, 7, 16)):
        out, source = cells(*shape), cells(*shape[:-2], shape[-1], shape[-2]).mT
        assert copy_tiles(out, source)
        assert torch.equal(bits(out), bits(source))


@needs_compiler
@pytest.mark.usefixtures("_any_size")
def test_what_it_is_not_for_is_left_to_torch(monkeypatch):
    out, source = cells(8, 8), cells(8, 8).mT
    assert not copy_tiles(out, source.mT), "one order"
    assert not copy_tiles(out[:, ::2], source[:, ::2]), "no dense dimension"
    assert not copy_tiles(out.view(torch.float64), source.mT.view(torch.float64))
    assert not copy_tiles(out.to("meta"), source)
    assert not permute_blocks(cells(2, 4, 8, 3), (0, 2, 1, 3), 1 << 20), "larger cells"
    monkeypatch.setattr(tile_copy, "MIN_BYTES", 1 << 20)
    assert not copy_tiles(out, source), "few bytes"


@needs_compiler
@pytest.mark.usefixtures("_any_size")
def test_what_torch_would_refuse_is_left_to_it():
    source = cells(8, 8).mT
    assert not copy_tiles(cells(8, 1).expand(8, 8), source), "elements that share memory"
    assert not copy_tiles(cells(8, 8), cells(1, 8).mT), "another shape"
    assert not copy_tiles(cells(8, 8), source.conj())
    assert not copy_tiles(cells(8, 8).requires_grad_(), source)


@needs_compiler
@pytest.mark.usefixtures("_threads", "_any_size")
@pytest.mark.parametrize("count", [1, 2, 7])
def test_blocks_are_permuted_in_place(count):
    blocks = cells(count, 16, 33)
    wanted, version = blocks.permute(0, 2, 1).clone(), blocks._version
    assert permute_blocks(blocks, (0, 2, 1), 2 * blocks[0].nbytes)
    assert torch.equal(bits(blocks).view(-1), bits(wanted).view(-1))
    assert blocks._version > version


def test_without_a_compiler_torch_copies(monkeypatch):
    monkeypatch.setattr(tile_copy.extension, "load", lambda name: Extension(None, "no compiler"))
    tile_copy._library.cache_clear()
    try:
        assert tile_copy._library() is None
        param = nn.Parameter(torch.randn(1024, 512), requires_grad=False)
        values = param.detach().clone()
        set_layout(param, "aiter_16x16")
        assert not torch.equal(param, values)
        assert torch.equal(logical(param), values)
        reset_layout(param)
        assert torch.equal(param, values)
    finally:
        tile_copy._library.cache_clear()

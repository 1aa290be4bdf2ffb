"""The weight shuffle and its inverse, interpreted, against aiter's definition."""

import pytest
import torch

from fixpass.runtime.kernels.shuffle import shuffle, unshuffle

DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32)


def values(shape, dtype):
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize)).byte().view(dtype)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


def aiter_shuffle(weight):
    """The layout as aiter documents it."""
    rows, hidden = weight.shape[-2:]
    cell = 16 // weight.element_size()
    cells = weight.view(-1, rows // 16, 16, hidden // 32, 32 // cell, cell)
    return cells.permute(0, 1, 3, 4, 2, 5).contiguous().view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (32, 96), (3, 48, 64)])
def test_the_shuffle_is_aiters_and_has_an_inverse(shape, dtype, device, launch):
    weight = values(shape, dtype)
    out, back = torch.empty_like(weight), torch.empty_like(weight)
    report = launch(shuffle, weight, out=out)
    assert report.faults == ()
    if device == "cpu":
        assert report.moved(("weight",), ("out",)) == 1.0
    assert torch.equal(raw(out), raw(aiter_shuffle(weight)))
    assert launch(unshuffle, out, out=back).faults == ()
    assert torch.equal(raw(back), raw(weight))


def test_a_shard_of_a_wider_weight_is_read_and_restored_in_place(launch):
    whole = values((2, 32, 200), torch.bfloat16)
    shard, kept = whole[:, :, 8:104], whole.clone()
    out = torch.empty(shard.shape, dtype=shard.dtype)
    assert launch(shuffle, shard, out=out).faults == ()
    assert torch.equal(raw(out), raw(aiter_shuffle(shard.contiguous())))
    shard.zero_()
    assert launch(unshuffle, out, out=shard).faults == ()
    assert torch.equal(raw(whole), raw(kept))


def test_no_experts_launch_nothing():
    none = torch.empty(0, 16, 32, dtype=torch.bfloat16)
    shuffle(none, out=none.clone())

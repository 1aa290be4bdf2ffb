"""Bytes come to where they belong, straight from the file or through a small buffer."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights import files
from fixpass.runtime.weights import read as reading
from fixpass.runtime.weights.files import OpenFile, in_turn
from fixpass.runtime.weights.formats.safetensors import DTYPES, from_files
from fixpass.runtime.weights.read import Work, copies, read
from fixpass.runtime.weights.stored import Box


def saved(tmp_path, **tensors):
    save_file(tensors, tmp_path / "w.safetensors")
    return from_files([tmp_path / "w.safetensors"]).tensors()


def fill(stored, target, source=None):
    return read(stored, target, source)


def test_a_thousand_tensors_are_read_by_few_calls(tmp_path):
    made = {f"w{i}": torch.randn(i % 7, 5) for i in range(1200)}
    stored = saved(tmp_path, **made)
    got = {name: torch.empty_like(tensor) for name, tensor in made.items()}
    filled = [
        copy
        for index, (name, one) in enumerate(stored.items())
        for copy in copies(one, Box.whole(one.shape), got[name], index)
    ]
    work = Work.of(filled, [got[name] for name in stored])
    assert len(work.batches) == 3
    work.run()
    assert all(torch.equal(got[name], made[name]) for name in made)


def test_a_read_that_stops_early_goes_on_inside_a_range(tmp_path, monkeypatch):
    made = torch.arange(1000)
    stored = saved(tmp_path, a=made[:300].clone(), b=made[300:].clone())
    real = files._preadv

    def short(descriptor, address, count, offset):
        taken = min(count, 1)
        numbers = (files.ctypes.c_uint64 * (2 * taken)).from_address(address)
        wanted, numbers[1] = numbers[1], min(numbers[1], 1000)
        done = real(descriptor, address, taken, offset)
        numbers[1] = wanted
        return done

    monkeypatch.setattr(files, "_preadv", short)
    a, b = torch.zeros(300, dtype=torch.int64), torch.zeros(700, dtype=torch.int64)
    both = [
        *copies(stored["a"], Box.whole((300,)), a, 0),
        *copies(stored["b"], Box.whole((700,)), b, 1),
    ]
    Work.of(both, (a, b)).run()
    assert torch.equal(torch.cat([a, b]), made)


def test_a_large_tensor_is_read_in_parts_by_two_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    monkeypatch.setattr(reading, "_SMALL", 0)
    made = torch.randn(100, 100)
    stored = saved(tmp_path, w=made)["w"]
    target, moved = torch.empty(100, 100), []
    work = Work.of(copies(stored, Box.whole((100, 100)), target), (target,))
    work.run(threads=2, advance=moved.append)
    assert torch.equal(target, made)
    assert len(moved) == 40
    assert sum(moved) == 40_000


@pytest.mark.parametrize("staging", [100, 1 << 20])
def test_slices_strides_and_casts_are_those_of_torch(tmp_path, monkeypatch, staging):
    monkeypatch.setattr(reading, "STAGING", staging)
    monkeypatch.setattr(reading, "_buffers", reading._Buffers())
    made = torch.randn(12, 10, 8)
    stored = saved(tmp_path, w=made)["w"]
    rows = fill(stored, torch.zeros(5, 10, 8), Box((3, 0, 0), (5, 10, 8)))
    assert torch.equal(rows, made[3:8])
    columns = fill(stored, torch.zeros(12, 10, 3), Box((0, 0, 2), (12, 10, 3)))
    assert torch.equal(columns, made[:, :, 2:5])
    turned = fill(stored, torch.zeros(8, 10, 12).transpose(0, 2))
    assert torch.equal(turned, made)
    cast = fill(stored, torch.zeros(12, 10, 8, dtype=torch.bfloat16))
    assert torch.equal(cast, made.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_of_every_dtype_are_kept_in_a_strided_target(tmp_path, dtype):
    made = torch.randint(0, 255, (6, 4 * dtype.itemsize), dtype=torch.uint8)
    if dtype is torch.bool:
        made %= 2
    made = made.view(dtype)
    stored = saved(tmp_path, w=made)["w"]
    target = torch.zeros(4, 6, dtype=torch.uint8).to(dtype).t()
    fill(stored, target)
    bits = reading._BITS[dtype.itemsize]
    assert torch.equal(target.contiguous().view(bits), made.view(bits))


def test_autograd_knows_that_a_saved_tensor_was_written(tmp_path):
    stored = saved(tmp_path, w=torch.ones(3))["w"]
    weight = torch.zeros(3, requires_grad=True)
    loss = (weight * weight).sum()
    fill(stored, weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_file_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path):
    stored = saved(tmp_path, w=torch.ones(1000))["w"]
    os.truncate(tmp_path / "w.safetensors", 2000)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: it became shorter"):
        fill(stored, torch.zeros(1000))


def test_what_cannot_be_read_names_the_file():
    memory = torch.zeros(1)
    with pytest.raises(CheckpointError, match="/: Is a directory at byte 0"):
        OpenFile(Path("/")).read(0, 4, in_turn((memory.data_ptr(),), (4,)))

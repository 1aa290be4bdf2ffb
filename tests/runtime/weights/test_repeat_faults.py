"""What may go wrong in a reload that is not planned again: the weights are the old ones, or new."""

import ctypes
import threading

import pytest
import torch
from reloading import MODES, holds, model_of, named, reloaded, saved
from safetensors.torch import save_file
from torch import nn

from fixpass.runtime.checkpoint import vectored
from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights import origins
from fixpass.runtime.weights.gate import gate_of
from fixpass.runtime.weights.versions import version


def test_nan_is_refused_in_a_reload_like_the_last(tmp_path):
    model, state = model_of(), saved(tmp_path, 1)
    reloaded(model, tmp_path)
    bad = {**state, "1.down.weight": torch.full((64, 32), torch.nan)}
    for index in range(2):
        save_file({n: bad[n] for n in list(bad)[index::2]}, tmp_path / f"m-{index}.safetensors")
    with pytest.raises(UpdateError, match=r"1\.down\.weight"):
        reloaded(model, tmp_path, finite=True)
    assert holds(model, state)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_breaks_while_it_is_read_changes_nothing(tmp_path, mode, monkeypatch):
    model = model_of()
    for seed in (1, 2):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    saved(tmp_path, 3)
    fill = vectored.fill

    def truncating(path, offset, *rest):
        with open(tmp_path / "m-1.safetensors", "r+b") as file:
            file.truncate(offset + 8)
        fill(path, offset, *rest)

    monkeypatch.setattr(vectored, "fill", truncating)
    with pytest.raises(CheckpointError, match=r"m-1\.safetensors: it became shorter") as caught:
        reloaded(model, tmp_path, mode, threads=1)
    assert "in m-1.safetensors" in caught.value.__notes__[0]
    assert holds(model, state)
    assert version(model) == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_changes_while_files_are_read_is_planned_again(
    tmp_path, plans, mode, monkeypatch
):
    model = model_of()
    for seed in (1, 2):
        saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    state = saved(tmp_path, 3)
    fill = vectored.fill

    def meddling(*args):
        monkeypatch.setattr(vectored, "fill", fill)
        model[0].up.weight.data = torch.zeros(32, 64)
        model[1].down.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)
        fill(*args)

    monkeypatch.setattr(vectored, "fill", meddling)
    reloaded(model, tmp_path, mode)
    assert holds(model, state)
    assert version(model) == 3
    assert len(plans) == 2


def test_an_interrupt_in_mid_commit_is_finished_first(tmp_path, monkeypatch):
    model = model_of()
    saved(tmp_path, 1)
    reloaded(model, tmp_path)
    state, moved, move = saved(tmp_path, 2), [], ctypes.memmove

    def interrupted(*args):
        moved.append(args)
        if len(moved) == 3:
            raise KeyboardInterrupt
        move(*args)

    monkeypatch.setattr(origins.ctypes, "memmove", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        reloaded(model, tmp_path, threads=1)
    assert "finished first" in caught.value.__notes__[0]
    assert holds(model, state)
    assert version(model) == 2


@pytest.mark.parametrize("mode", MODES)
def test_it_waits_for_calls_under_way(tmp_path, mode):
    model = model_of()
    for seed in (1, 2):
        saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    state, started = saved(tmp_path, 3), threading.Event()
    with gate_of(model).reading():
        before = {name: value.clone() for name, value in named(model)}

        def work():
            started.set()
            reloaded(model, tmp_path, mode)

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        thread.join(0.2)
        assert thread.is_alive()
        assert holds(model, before)
    thread.join(60)
    assert holds(model, state)

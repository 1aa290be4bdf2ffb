"""What may go wrong in a reload that is not planned again: the weights are the old ones, or new."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights import commit_guards as double
from fixpass.runtime.weights import files
from fixpass.runtime.weights.files import TEMPORARY, OpenFile
from fixpass.runtime.weights.lock import lock_of, version
from helpers.reloading import MODES, holds, model_of, named, reloaded, saved


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
    read = OpenFile.read

    def truncating(file, offset, *rest):
        if file.path is not TEMPORARY:
            os.truncate(tmp_path / "m-1.safetensors", offset + 8)
        read(file, offset, *rest)

    monkeypatch.setattr(OpenFile, "read", truncating)
    with pytest.raises(CheckpointError, match=r"m-1\.safetensors: it became shorter") as caught:
        reloaded(model, tmp_path, mode, threads=1)
    assert "in m-1.safetensors" in caught.value.__notes__[0]
    assert holds(model, state)
    assert version(model) == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_changes_while_files_are_opened_is_refused(tmp_path, mode, monkeypatch):
    model = model_of()
    for seed in (1, 2):
        saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    state = saved(tmp_path, 3)
    check = OpenFile.check

    def meddling(*args, **options):
        monkeypatch.setattr(OpenFile, "check", check)
        model[0].up.weight.data = torch.zeros(32, 64)
        model[1].down.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)
        check(*args, **options)

    monkeypatch.setattr(OpenFile, "check", meddling)
    with pytest.raises(UpdateError, match=r"0\.up\.weight: address was.*1\.down\.weight: another"):
        reloaded(model, tmp_path, mode)
    assert not model[0].up.weight.any()
    assert not model[1].down.weight.any()
    assert version(model) == 2
    reloaded(model, tmp_path, mode)
    assert holds(model, state)


def test_an_interrupt_in_mid_commit_is_finished_first(tmp_path, monkeypatch):
    model = model_of()
    saved(tmp_path, 1)
    reloaded(model, tmp_path)
    state, moved, move = saved(tmp_path, 2), [], files.move

    def interrupted(*args):
        moved.append(args)
        if len(moved) == 2:
            raise KeyboardInterrupt
        move(*args)

    monkeypatch.setattr(files, "move", interrupted)
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
    with lock_of(model).read_lock():
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


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_were_a_mixture_are_whole_after_it(tmp_path, mode):
    model = model_of()
    for seed in (1, 2, 3):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    lock_of(model).poisoned = "an update failed"
    state = saved(tmp_path, 4)
    reloaded(model, tmp_path, mode)
    with lock_of(model).read_lock():
        assert holds(model, state)


# The second set of memory


def twice(folder, model):
    for seed in (1, 2):
        state = saved(folder, seed, model=model)
        reloaded(model, folder, "double_buffer")
    return state


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).requires_grad_(False)


def test_memory_of_another_layout_is_not_put_in_place(tmp_path):
    """What was in use before the layout changed lies as the old one."""
    model = small()
    twice(tmp_path, model)
    model[0].weight.data = model[0].weight.data.view(8, 4)
    for mode in ("buffered", "double_buffer", "double_buffer"):
        state = saved(tmp_path, 3, model=model)
        reloaded(model, tmp_path, mode)
        assert model[0].weight.shape == (8, 4)
        assert holds(model, state)


def test_weights_that_were_brought_back_by_hand_are_not_written_before_the_gate_closes(
    tmp_path, monkeypatch
):
    model = small()
    state = twice(tmp_path, model)
    old = [param.data for param in model.parameters()]
    saved(tmp_path, 3, model=model)
    reloaded(model, tmp_path, "double_buffer")
    for param, data in zip(model.parameters(), old, strict=True):
        param.data = data
    assert holds(model, state)
    read, seen = OpenFile.read, []

    def looking(*args):
        read(*args)
        seen.append(holds(model, state))

    monkeypatch.setattr(OpenFile, "read", looking)
    fresh = saved(tmp_path, 4, model=model)
    reloaded(model, tmp_path, "double_buffer")
    assert holds(model, fresh)
    assert all(seen)


def test_tensors_that_the_user_keeps_are_not_written_over(tmp_path):
    model = small()
    twice(tmp_path, model)
    kept = model.state_dict()
    values = {name: value.clone() for name, value in kept.items()}
    for seed in (3, 4, 5):
        saved(tmp_path, seed, model=model)
        reloaded(model, tmp_path, "double_buffer")
    assert all(torch.equal(kept[name], values[name]) for name in kept)
    reloaded(model, kept, "double_buffer")
    assert holds(model, values)


def test_memory_whose_storage_the_user_keeps_is_not_written_over(tmp_path):
    model = small()
    twice(tmp_path, model)
    kept = model[0].weight.untyped_storage()
    values = torch.empty(0).set_(kept).clone()
    for seed in (3, 4, 5):
        state = saved(tmp_path, seed, model=model)
        reloaded(model, tmp_path, "double_buffer")
        assert holds(model, state)
    assert torch.equal(torch.empty(0).set_(kept), values)


def test_what_came_to_share_memory_with_a_weight_goes_on_to_share_it(tmp_path):
    model = small()
    twice(tmp_path, model)
    model.register_buffer("row", model[0].weight[1], persistent=False)
    for seed in (3, 4, 5):
        state = saved(tmp_path, seed, model=model)
        reloaded(model, tmp_path, "double_buffer")
        assert holds(model, state)
        assert torch.equal(model.row, state["0.weight"][1])


def test_an_interrupt_after_the_exchange_leaves_whole_weights_and_no_memory_to_write_over(
    tmp_path, monkeypatch
):
    model = small()
    state = twice(tmp_path, model)
    fresh, point = saved(tmp_path, 3, model=model), double._point

    def interrupted(*args):
        monkeypatch.setattr(double, "_point", point)
        point(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(double, "_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reloaded(model, tmp_path, "double_buffer")
    assert holds(model, state) or holds(model, fresh)
    for seed in (4, 5):
        state = saved(tmp_path, seed, model=model)
        reloaded(model, tmp_path, "double_buffer")
        assert holds(model, state)


# Where it may be called


@pytest.mark.parametrize("mode", MODES)
def test_a_default_device_is_not_where_bytes_are_staged(tmp_path, mode):
    model = small()
    for seed in range(4):
        state = saved(tmp_path, seed, model=model)
        with torch.device("meta"):
            reloaded(model, tmp_path if seed % 2 else state, mode)
        assert holds(model, state)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_shares_what_is_not_loaded_is_not_kept_waiting(tmp_path, mode):
    model, other = small(), small()
    other[1] = model[1]
    for seed in range(3):
        state = saved(tmp_path, seed, model=model[0])
        with lock_of(other).read_lock():
            named_so = {f"0.{name}": value for name, value in state.items()}
            reloaded(model, named_so, mode, scope="parameters")
        assert torch.equal(model[0].weight, state["weight"])
    assert (version(model), version(other)) == (3, 0)


def test_a_sparse_buffer_is_no_reason_to_fail_after_the_commit(tmp_path):
    model = small()
    model.register_buffer("mask", torch.eye(4).to_sparse())
    for seed in range(3):
        state = {"0.weight": torch.full((4, 8), float(seed))}
        reloaded(model, state, scope="parameters")
        assert torch.equal(model[0].weight, state["0.weight"])

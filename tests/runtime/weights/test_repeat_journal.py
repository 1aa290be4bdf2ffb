"""A reload like the last one in mode journal: whatever happens, the old bytes come back."""

from array import array

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError, PoisonedError, UpdateError
from fixpass.runtime.weights import vectored
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.old_bytes import OldBytes
from helpers.reloading import holds, model_of, reloaded, saved


@pytest.fixture
def twice(tmp_path):
    """A model whose next reload is like the last, its weights, and the folder with others."""
    model = model_of()
    for seed in (1, 2):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, "undo_log")
    saved(tmp_path, 3)
    return model, state, tmp_path


def failing(monkeypatch, owner, name, error, after=0):
    """Let a function raise when it was called so many times."""
    original, calls = getattr(owner, name), []

    def run(*args):
        calls.append(args)
        if len(calls) > after:
            monkeypatch.setattr(owner, name, original)
            raise error
        return original(*args)

    monkeypatch.setattr(owner, name, run)
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("gone"), MemoryError()])
def test_an_exception_in_mid_commit_brings_the_old_bytes_back(twice, monkeypatch, error):
    model, state, folder = twice
    seen, restore = [], OldBytes.restore

    def looking(self):
        seen.append(holds(model, state))
        restore(self)

    monkeypatch.setattr(OldBytes, "restore", looking)
    failing(monkeypatch, vectored, "fill", error, after=1)
    with pytest.raises(type(error)):
        reloaded(model, folder, "undo_log", threads=1)
    assert seen == [False], "some of it had been written"
    assert holds(model, state)
    assert version(model) == 2
    with lock_of(model).read_lock():
        pass


def test_where_they_do_not_come_back_calls_raise_until_all_weights_are_loaded(twice, monkeypatch):
    model, _, folder = twice
    failing(monkeypatch, vectored, "fill", CheckpointError("gone"), after=1)
    failing(monkeypatch, OldBytes, "restore", OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        reloaded(model, folder, "undo_log", threads=1)
    with pytest.raises(PoisonedError), lock_of(model).read_lock():
        pass
    state = saved(folder, 4)
    reloaded(model, folder, "undo_log")
    with lock_of(model).read_lock():
        assert holds(model, state)


def test_no_place_for_the_old_bytes_is_an_error_before_any_changes(twice, monkeypatch):
    model, state, folder = twice
    reads = failing(monkeypatch, vectored, "fill", AssertionError("it reads"))
    failing(monkeypatch, vectored, "write", CheckpointError("No space left on device"))
    with pytest.raises(CheckpointError, match="No space left"):
        reloaded(model, folder, "undo_log")
    assert not reads
    assert holds(model, state)


def test_what_a_full_disk_says_is_said(tmp_path):
    values = torch.ones(8)
    numbers = array("Q", (values.data_ptr(), values.nbytes))
    with (
        open("/dev/full", "r+b", buffering=0) as file,
        pytest.raises(CheckpointError, match="No space left on device"),
    ):
        vectored.write(file.fileno(), tmp_path, 0, values.nbytes, numbers)


def test_a_write_while_the_old_bytes_are_kept_ends_the_update(twice, monkeypatch):
    model, _, folder = twice
    write = vectored.write

    def meddling(*args):
        write(*args)
        model[0].up.weight.fill_(7.0)

    monkeypatch.setattr(vectored, "write", meddling)
    with pytest.raises(UpdateError, match="begin again"):
        reloaded(model, folder, "undo_log")
    assert (model[0].up.weight == 7.0).all()
    assert version(model) == 2


def test_weights_of_the_model_itself_may_be_given(plans):
    model = model_of()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(4):
        live = model.state_dict()
        live["0.up.weight"], live["1.up.weight"] = live["1.up.weight"], live["0.up.weight"]
        reloaded(model, live, "undo_log")
        one, other = ("1", "0") if number % 2 == 0 else ("0", "1")
        assert torch.equal(model[0].up.weight, values[f"{one}.up.weight"])
        assert torch.equal(model[1].up.weight, values[f"{other}.up.weight"])
    assert len(plans) == 4, "bytes that are read from where others are written are set aside"


@pytest.mark.parametrize("mode", ["undo_log", "double_buffer", "buffered"])
def test_weights_of_the_model_may_be_given_through_numpy(mode):
    """Whose tensors have storages of their own over the same memory."""
    model = nn.ParameterDict({name: torch.zeros(8, 8) for name in "ab"}).requires_grad_(False)
    first, second = torch.randn(8, 8), torch.randn(8, 8)
    reloaded(model, {"a": first, "b": second}, mode)
    for number in range(3):
        rows = {name: model[name].numpy().reshape(-1)[:64] for name in "ab"}
        given = {"a": torch.from_numpy(rows["b"]), "b": torch.from_numpy(rows["a"])}
        reloaded(model, {name: value.view(8, 8) for name, value in given.items()}, mode)
        one, other = (second, first) if number % 2 == 0 else (first, second)
        assert torch.equal(model["a"], one)
        assert torch.equal(model["b"], other)

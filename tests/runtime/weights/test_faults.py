"""What happens when a commit fails half way, or its process does: old weights, or a clear word."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.runtime.errors import CheckpointError, PoisonedError, UpdateError
from fixpass.runtime.weights import files
from fixpass.runtime.weights.commit_guards import UndoLog
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.state_file import read_state, resume
from fixpass.runtime.weights.update import update
from helpers import weights_workers as workers
from helpers.ranks import Ranks


def model_of():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.0)
    return model


def holds(model, value):
    return all(bool((param == value).all()) for param in model.parameters())


def failing(monkeypatch, after, error, times=1):
    """Let the move of the tensor with this number fail, that many times."""
    done, failed, move = [], [], files.move

    def failing_move(*args):
        if len(done) >= after and len(failed) < times:
            failed.append(args)
            raise error
        done.append(args)
        move(*args)

    monkeypatch.setattr(files, "MOST_PARTS", 1)
    monkeypatch.setattr(files, "move", failing_move)
    return done


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone")])
def test_an_undo_log_brings_the_old_weights_back(monkeypatch, error):
    model = model_of()
    done = failing(monkeypatch, 4, error)
    with pytest.raises(type(error)), update(model, "undo_log", threads=1) as tx:
        tx.load_state_dict(workers.full(1))
    assert len(done) >= 4
    assert holds(model, 0)
    assert version(model) == 0
    with lock_of(model).read_lock():
        pass


def test_no_room_for_the_old_bytes_is_an_error_before_any_changes(monkeypatch):
    model = model_of()
    full = Path("/dev/full")
    monkeypatch.setattr(OpenFile, "temporary", lambda: OpenFile(full, os.open(full, os.O_RDWR)))
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        update(model, "undo_log") as tx,
    ):
        tx.load_state_dict(workers.full(1))
    assert holds(model, 0)
    assert version(model) == 0


def test_old_bytes_that_do_not_come_back_let_calls_raise_until_all_is_loaded(monkeypatch):
    model = model_of()
    failing(monkeypatch, 4, RuntimeError("the device is gone"))
    monkeypatch.setattr(UndoLog, "restore", lambda log: os.stat("/not/there"))
    with pytest.raises(FileNotFoundError), update(model, "undo_log", threads=1) as tx:
        tx.load_state_dict(workers.full(1))
    with pytest.raises(PoisonedError), lock_of(model).read_lock():
        pass
    monkeypatch.undo()
    with update(model, "undo_log") as tx:
        tx.load_state_dict(workers.full(2))
    with lock_of(model).read_lock():
        assert holds(model, 2)


def test_a_write_while_the_old_bytes_are_kept_is_not_lost_in_a_rollback(monkeypatch):
    model, keep = model_of(), UndoLog.__init__

    def keep_and_write(*args):
        keep(*args)
        with torch.no_grad():
            model[0].weight.fill_(5.0)

    monkeypatch.setattr(UndoLog, "__init__", keep_and_write)
    with (
        pytest.raises(UpdateError, match="written while an update was open"),
        update(model, "undo_log") as tx,
    ):
        tx.load_state_dict(workers.full(1))
    assert bool((model[0].weight == 5.0).all())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone")])
def test_a_second_set_of_memory_is_thrown_away(monkeypatch, error):
    model = model_of()
    failing(monkeypatch, 4, error)
    with pytest.raises(type(error)), update(model, "double_buffer", threads=1) as tx:
        tx.load_state_dict(workers.full(1))
    assert holds(model, 0)
    assert version(model) == 0


def test_a_buffered_commit_that_is_interrupted_is_finished_first(monkeypatch):
    model = model_of()
    failing(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), update(model, "buffered", threads=1) as tx:
        tx.load_state_dict(workers.full(1))
    assert holds(model, 1)
    assert version(model) == 1


def test_weights_that_could_not_be_made_whole_are_used_by_no_call(monkeypatch):
    model = model_of()
    failing(monkeypatch, 4, RuntimeError("the device is gone"), times=2)
    with pytest.raises(RuntimeError, match="device"), update(model, threads=1) as tx:
        tx.load_state_dict(workers.full(1))
    with (
        pytest.raises(PoisonedError, match="are a mixture: update all"),
        lock_of(model).read_lock(),
    ):
        pass
    with (
        pytest.raises(PoisonedError, match="does not make them whole"),
        update(model, scope="parts"),
    ):
        pass
    with update(model) as tx:
        tx.load_state_dict(workers.full(2))
    with lock_of(model).read_lock() as number:
        assert number == 1
    assert holds(model, 2)


@pytest.mark.parametrize("mode", ["buffered", "undo_log"])
def test_the_next_start_after_a_kill_says_what_state_the_weights_are_in(tmp_path, mode):
    weights, state = tmp_path / "weights", tmp_path / "state.json"
    weights.write_bytes(bytes(8 * 256 * 4))
    done = subprocess.run(
        [sys.executable, "-P", workers.__file__, str(weights), str(state), mode],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    model = workers.file_model(weights)
    assert {int(param.mean()) for param in model.parameters()} == {1, 2}
    found = resume(model, state)
    assert (found.state, found.version, found.to, found.mode) == ("committing", 1, 2, mode)
    assert "may be a mixture of versions 1 and 2" in str(found)
    with pytest.raises(PoisonedError, match="ended in the middle"), lock_of(model).read_lock():
        pass
    with pytest.raises(PoisonedError), update(model, mode, scope="parameters", state_file=state):
        pass
    with update(model, mode, state_file=state) as tx:
        tx.load_state_dict(workers.full(3))
    assert str(read_state(state)) == "committed: all weights are of version 2"
    again = workers.file_model(weights)
    assert resume(again, state).state == "committed"
    assert version(again) == 2
    assert holds(again, 3)


def test_a_failed_update_leaves_a_state_file_that_says_so(tmp_path, monkeypatch):
    model, state = model_of(), tmp_path / "state.json"
    failing(monkeypatch, 4, RuntimeError("the device is gone"))
    with pytest.raises(RuntimeError), update(model, "undo_log", threads=1, state_file=state) as tx:
        tx.load_state_dict(workers.full(1))
    assert read_state(state).state == "committed"
    assert read_state(state).version == 0


def test_a_state_file_that_is_broken_is_refused(tmp_path):
    path = Path(tmp_path / "state.json")
    assert resume(model_of(), path) is None
    for text in ("{", '{"state": 1, "what": 2}', "[]"):
        path.write_text(text)
        with pytest.raises(UpdateError, match="is no state of an update"):
            resume(model_of(), path)


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


def test_declared_tensors_of_sharded_weights_follow(two):
    assert two.run(workers.refresh_sharded) == [[True] * 4] * 2


@pytest.mark.parametrize("mode", ["buffered", "undo_log"])
@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_a_sharded_model_is_updated_from_whole_tensors_and_from_shards(two, mode, way):
    for wrong, same, number in two.run(workers.update_sharded, mode, way):
        assert wrong == []
        assert same
        assert number == 2


def test_a_sharded_model_is_reloaded_again_and_again_by_one_plan(two, tmp_path):
    for number in (1, 2, 3):
        torch.manual_seed(number)
        model = workers.Whole()
        (tmp_path / str(number)).mkdir()
        save_file(model.state_dict(), tmp_path / str(number) / "w.safetensors")
    for wrong, plans, number in two.run(workers.reload_sharded, str(tmp_path)):
        assert wrong == []
        assert plans == 1
        assert number == 3


def test_plain_writes_into_a_sharded_model_are_refused_or_lost(two):
    for copied, written in two.run(workers.write_plainly):
        assert "mixed torch.Tensor and DTensor" in copied
        assert written == "lost"


def test_a_sharded_model_refuses_folds_and_a_second_set_of_memory(two):
    for folded, doubled in two.run(workers.refuse_sharded):
        assert (
            "up, torch.float32 (32, 16), cannot be given layout aiter_16x16: it is a DTensor"
            in folded
        )
        assert "is a DTensor, whose memory FSDP2 holds too" in doubled

"""The lock: calls go together, an update goes alone, and nobody waits for ever."""

import threading
import time

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import PoisonedError, UpdateError, VersionError
from fixpass.runtime.weights.lock import (
    WeightsLock,
    bump,
    closed,
    lock_of,
    over,
    read_lock,
    version,
    write_lock,
)
from fixpass.runtime.weights.weight_version import write_key
from helpers.threads import in_thread


class Reader:
    """A call in another thread that stays inside until it is told to end."""

    def __init__(self, lock):
        self.entered, self.end = threading.Event(), threading.Event()
        self.lock = lock
        self.thread = in_thread(self.run)

    def run(self):
        with self.lock.read_lock():
            self.entered.set()
            self.end.wait(10)

    def finish(self):
        self.end.set()
        self.thread.join(10)


def test_calls_go_through_together():
    lock = WeightsLock()
    readers = [Reader(lock), Reader(lock)]
    assert all(reader.entered.wait(5) for reader in readers)
    for reader in readers:
        reader.finish()


def test_an_update_waits_for_the_calls_under_way_and_holds_back_new_ones():
    lock, order = WeightsLock(), []
    first = Reader(lock)
    assert first.entered.wait(5)
    closing = threading.Event()

    def update():
        closing.set()
        with lock.write_lock():
            order.append("update")

    def call():
        with lock.read_lock():
            order.append("call")

    writer = in_thread(update)
    closing.wait(5)
    while not lock._waiting:
        time.sleep(0.001)
    late = in_thread(call)
    time.sleep(0.02)
    assert order == []
    first.finish()
    writer.join(5)
    late.join(5)
    assert order == ["update", "call"]


def test_a_call_inside_a_call_goes_on_while_an_update_waits():
    outer, inner, done = WeightsLock(), WeightsLock(), threading.Event()
    waiting = threading.Event()

    def update():
        waiting.set()
        with closed((inner, outer)):
            done.set()

    with outer.read_lock():
        thread = in_thread(update)
        waiting.wait(5)
        while not outer._waiting:
            time.sleep(0.001)
        with outer.read_lock(), inner.read_lock():
            assert not done.is_set()
    thread.join(5)
    assert done.is_set()


def test_the_thread_that_updates_may_call_the_model():
    lock = WeightsLock()
    with lock.write_lock(), lock.write_lock(), lock.read_lock() as seen:
        assert seen == 0
    assert not lock._readers


def test_an_update_inside_a_call_is_refused():
    lock = WeightsLock()
    with lock.read_lock(), pytest.raises(UpdateError, match="inside a call"), lock.write_lock():
        pass


def test_an_update_gives_up_at_its_timeout_and_lets_calls_through_again():
    lock = WeightsLock()
    reader = Reader(lock)
    assert reader.entered.wait(5)
    with (
        pytest.raises(UpdateError, match="1 calls of the model did not end"),
        lock.write_lock(0.01),
    ):
        pass
    other = Reader(lock)
    assert other.entered.wait(5)
    other.finish()
    reader.finish()


def test_no_call_uses_poisoned_weights():
    lock = WeightsLock()
    lock.poisoned = "half of an update could not be undone"
    with pytest.raises(PoisonedError, match="half of an update"), lock.read_lock():
        pass
    with lock.write_lock(), lock.read_lock():
        pass


def test_a_model_has_one_lock_through_its_wrappers():
    model = nn.Sequential(nn.Linear(2, 2))
    assert lock_of(model) is lock_of(torch.compile(model, backend="eager"))
    assert lock_of(model) is lock_of(nn.DataParallel(model))
    assert lock_of(model) is not lock_of(model[0])


def test_an_update_of_a_part_closes_the_locks_of_the_whole_and_none_of_others():
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    whole, part, beside = lock_of(model), lock_of(model[0]), lock_of(model[1])
    lock_of(other)
    assert set(over([model[0].weight])) == {whole, part}
    assert set(over(model.parameters())) == {whole, part, beside}


def test_locks_die_with_their_models():
    model = nn.Linear(2, 2)
    weight = model.weight
    lock_of(model)
    del model
    assert over([weight]) == ()


def test_versions_rise_for_all_that_share_a_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for module in (model, *model):
        lock_of(module)
    assert version(model) == 0
    assert bump(model[0]) == 1
    assert [version(module) for module in (model, *model)] == [1, 1, 0]
    assert bump(model, 7) == 7
    with lock_of(model).read_lock() as seen:
        assert seen == 7
    with pytest.raises(VersionError, match="version 7 does not follow version 7"):
        bump(model, 7)


@pytest.mark.parametrize("name", ["copy_", "step", "data=", "swap"])
def test_a_key_changes_with_a_write_that_torch_counts_and_with_other_memory(name):
    param = nn.Parameter(torch.zeros(4))
    before = write_key(param)
    assert before == write_key(param)
    if name == "copy_":
        with torch.no_grad():
            param.copy_(torch.ones(4))
    elif name == "step":
        param.grad = torch.ones(4)
        torch.optim.SGD([param]).step()
    elif name == "data=":
        param.data = torch.ones(4)
    else:
        torch.utils.swap_tensors(param, nn.Parameter(torch.ones(4)))
    assert write_key(param) != before


def test_a_key_of_a_tensor_of_inference_mode_is_of_its_memory():
    with torch.inference_mode():
        tensor = torch.zeros(4)
    assert write_key(tensor) == (-1, tensor.data_ptr())


def test_a_load_that_is_no_update_can_hold_back_calls_of_the_model_and_its_parts():
    model = nn.Sequential(nn.Linear(2, 2))
    with read_lock(model[0]):
        pass
    with write_lock(model):
        reader = Reader(lock_of(model[0]))
        assert not reader.entered.wait(0.02)
    assert reader.entered.wait(5)
    reader.finish()
    with read_lock(model), pytest.raises(UpdateError, match="inside a call"), write_lock(model):
        pass

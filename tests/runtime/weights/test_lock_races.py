"""Calls and updates that come at the same moment: each sees the other, and nobody waits for ever."""

import inspect
import sys
import threading
import time

import pytest

from fixpass.runtime.weights import lock as lock_module
from fixpass.runtime.weights.lock import WeightsLock, closed
from helpers.threads import in_thread


@pytest.fixture
def _switching():
    """Threads change places after every few steps of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching")
def test_no_call_is_inside_while_an_update_is():
    locks, inside, torn, done = (WeightsLock(), WeightsLock()), [], [], threading.Event()
    values = [0, 0]

    def call():
        while not done.is_set():
            with locks[0].read_lock() as seen, locks[1].read_lock():
                first = values[0]
                torn.extend(inside)
                if values[1] != first or locks[0].version != seen:
                    torn.append((first, values[1]))

    def update():
        while not done.is_set():
            with closed(locks):
                inside.append(threading.get_ident())
                values[0] += 1
                locks[0].version += 1
                values[1] += 1
                inside.pop()

    threads = [in_thread(call) for _ in range(4)] + [in_thread(update) for _ in range(2)]
    time.sleep(2.0)
    done.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "somebody waits for ever"
    assert not torn
    assert values[0] == values[1] > 20
    assert not any(lock._readers for lock in locks)


@pytest.mark.usefixtures("_switching")
def test_calls_inside_calls_and_updates_never_wait_for_each_other_for_ever():
    locks, done, counts = (WeightsLock(), WeightsLock()), threading.Event(), [0, 0, 0]

    def call(first, second, number):
        while not done.is_set():
            with first.read_lock(), second.read_lock(), first.read_lock():
                counts[number] += 1

    def update():
        while not done.is_set():
            with locks[0].write_lock(), locks[1].read_lock():
                counts[2] += 1

    threads = [
        in_thread(lambda: call(locks[0], locks[1], 0)),
        in_thread(lambda: call(locks[1], locks[0], 1)),
        in_thread(update),
    ]
    time.sleep(1.0)
    done.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(counts)


class Counted(dict):
    """Readers of a lock, with something that happens as the first of them is counted."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.before, self.after = before, after

    def __setitem__(self, reader, thread):
        before, self.before = self.before, None
        if before is not None:
            before()
        super().__setitem__(reader, thread)
        after, self.after = self.after, None
        if after is not None:
            after()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_of_a_call_and_an_update_that_come_together_one_sees_the_other(moment):
    lock, order, held, end = WeightsLock(), [], threading.Event(), threading.Event()

    def update():
        with lock.write_lock():
            order.append("update begins")
            held.set()
            end.wait(10)
            order.append("update ends")

    def arrives():
        in_thread(update)
        while not (held.is_set() if moment == "before" else lock._waiting):
            time.sleep(0.001)

    def call():
        with lock.read_lock():
            order.append("call")

    lock._readers = Counted(**{moment: arrives})
    thread = in_thread(call)
    time.sleep(0.1)
    end.set()
    thread.join(5)
    with lock.write_lock():
        assert order == ["update begins", "update ends", "call"], "the call steps back"


@pytest.mark.usefixtures("_switching")
def test_locks_that_others_make_meanwhile_are_in_nobodys_way():
    lock, done, failed = WeightsLock(), threading.Event(), []

    def work(step):
        try:
            while not done.is_set():
                step()
        except Exception as error:
            failed.append(error)

    def call():
        with lock.read_lock():
            pass

    def update():
        with lock.write_lock():
            pass

    kept = [WeightsLock() for _ in range(20)]
    steps = (call, call, update, lambda: kept.append(WeightsLock()) or kept.pop(0))
    threads = [in_thread(lambda step=step: work(step)) for step in steps]
    time.sleep(1.0)
    done.set()
    for thread in threads:
        thread.join(10)
    assert not failed


@pytest.mark.parametrize("late", [False, True])
def test_a_call_that_is_interrupted_as_it_waits_is_not_counted(monkeypatch, late):
    lock, enter = WeightsLock(), WeightsLock._enter_busy

    def interrupted(self, reader, me):
        if late:
            enter(self, reader, me)
        raise KeyboardInterrupt

    lock.poisoned = "" if late else "so that it is busy"
    lock._busy = True
    monkeypatch.setattr(WeightsLock, "_enter_busy", interrupted)
    with pytest.raises(KeyboardInterrupt), lock.read_lock():
        pass
    assert not lock._readers
    with lock.write_lock(1.0):
        pass


def test_an_update_whose_wake_up_was_lost_looks_again():
    lock, entered, updated = WeightsLock(), threading.Event(), threading.Event()

    def update():
        entered.set()
        with lock.write_lock():
            updated.set()

    with lock.read_lock():
        thread = in_thread(update)
        entered.wait(5)
        while not lock._waiting:
            time.sleep(0.001)
        # As if the call had left, and an interrupt had come before it said so.
        ((reader, me),) = lock._readers.items()
        lock._readers.clear()
        assert updated.wait(5)
        thread.join(5)
        lock._readers[reader] = me


def test_an_interrupt_at_any_line_of_an_update_that_closes_locks_lets_calls_in_again():
    class Interrupt(BaseException):
        pass

    source, first = inspect.getsourcelines(lock_module._close)
    with_line = first + source.index("    with _mutex:\n")

    def interrupted_at(count):
        """Close a lock and raise at this line; whether there was such a line."""
        left, inside = [count], [False]

        def trace(frame, event, argument):
            if frame.f_code is not lock_module._close.__code__:
                return None
            # Python looks for interrupts nowhere between the end of a block and its exit.
            if event != "line" or (inside[0] and frame.f_lineno == with_line):
                return trace
            inside[0] |= frame.f_lineno == with_line
            left[0] -= 1
            if left[0] == 0:
                raise Interrupt
            return trace

        lock, before = WeightsLock(), sys.gettrace()
        sys.settrace(trace)
        try:
            with closed((lock,)):
                pass
        except Interrupt:
            pass
        finally:
            sys.settrace(before)
        call = in_thread(lambda: lock.read_lock().__enter__())
        call.join(10)
        assert not call.is_alive()
        return left[0] <= 0

    count = 1
    while interrupted_at(count):
        count += 1
    assert count > 10

"""Readers of a lock that end in other threads than they began in, or that an interrupt ends."""

import threading
import time
from contextlib import nullcontext

import pytest

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.lock import WeightsLock
from helpers.threads import in_thread


@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "inside another call"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_may_take_turns_at_a_generator_that_holds_the_lock(threads, inside):
    lock, seen = WeightsLock(), []

    def stream():
        with lock.read_lock():
            yield from range(threads)

    def step():
        with lock.read_lock() if inside else nullcontext():
            seen.append(next(numbers, "end"))

    numbers = stream()
    for _ in range(threads + 1):
        in_thread(step).join(5)
    assert seen == [*range(threads), "end"]
    assert not lock._readers
    with lock.write_lock(1.0):
        pass


def test_a_call_that_ends_in_another_thread_is_waited_for_until_then():
    lock, updated = WeightsLock(), threading.Event()

    def stream():
        with lock.read_lock():
            yield

    def update():
        with lock.write_lock():
            updated.set()

    calls = stream()
    in_thread(lambda: next(calls)).join(5)
    thread = in_thread(update)
    assert not updated.wait(1.5), "it looks again after a second, and the generator is alive"
    in_thread(calls.close).join(5)
    thread.join(5)
    assert updated.is_set()


def test_an_update_of_a_new_thread_waits_for_the_call_of_an_ended_thread_with_its_ident():
    lock, idents, said = WeightsLock(), [], []

    def stream():
        idents.append(threading.get_ident())
        with lock.read_lock():
            yield

    def update():
        if threading.get_ident() in idents:
            with pytest.raises(UpdateError) as error, lock.write_lock(0.01):
                pass
            said.append(str(error.value))

    calls = stream()
    in_thread(lambda: next(calls)).join(5)
    for _ in range(100):
        in_thread(update).join(5)
    if not said:
        pytest.skip("this system gives no ident of a thread again")
    assert "1 calls of the model did not end within 0.01 s" in said[0]
    calls.close()


def interrupted(lock):
    """A call that an interrupt ended between the entry and the body of its `with` statement."""
    lock.read_lock().__enter__()


def test_a_call_that_an_interrupt_ended_is_waited_for_no_longer():
    lock = WeightsLock()
    interrupted(lock)
    with lock.write_lock(0.1):
        assert not lock._readers


def test_a_call_that_an_interrupt_ends_while_an_update_waits_is_waited_for_no_longer():
    lock, updated = WeightsLock(), threading.Event()

    def update():
        with lock.write_lock():
            updated.set()

    with lock.read_lock():
        thread = in_thread(update)
        while not lock._waiting:
            time.sleep(0.001)
        interrupted(lock)
        assert not updated.wait(1.5), "the call that goes on is waited for"
    thread.join(5)
    assert updated.is_set()

"""Whether a process of this host still runs, is stopped, or has ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fixpass.runtime.weights.processes import Process, has_ended, is_stopped, this_process

SLEEPS = "import time; time.sleep(100)"


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-S", "-c", SLEEPS]) as child:
        yield child
        child.kill()


def process_of(child):
    """What the child would say of itself."""
    with open(f"/proc/{child.pid}/stat") as file:
        started = file.read().rpartition(")")[2].split()[19]
    return Process(this_process(), pid=child.pid, started=started)


def wait_for(condition, *args):
    for _ in range(1000):
        if condition(*args):
            return True
        time.sleep(0.01)
    return False


def test_this_process_runs():
    assert not has_ended(this_process())
    assert not is_stopped(this_process())
    assert str(os.getpid()) in this_process()["text"]


def test_a_stopped_process_has_not_ended(child):
    process = process_of(child)
    assert not is_stopped(process)
    os.kill(child.pid, signal.SIGSTOP)
    assert wait_for(is_stopped, process)
    assert not has_ended(process)


def test_a_killed_process_has_ended_before_its_parent_looks(child):
    process = process_of(child)
    child.kill()
    assert wait_for(has_ended, process)
    child.wait()
    assert has_ended(process)
    assert not is_stopped(process)


def test_another_process_with_the_same_pid_is_told_apart(child):
    assert has_ended(Process(process_of(child), started="1"))


@pytest.mark.parametrize("unknown", [{"place": "elsewhere"}, {"started": ""}])
def test_a_process_that_cannot_be_looked_up_counts_as_running(child, unknown):
    process = Process(process_of(child), **unknown)
    child.kill()
    child.wait()
    assert not has_ended(process)
    assert not is_stopped(process)

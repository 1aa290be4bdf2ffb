"""Whether a process of this host still runs, is stopped, or has ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fixpass.runtime.weights.processes import Process, state_of, this_process

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


def wait_for(state, process):
    for _ in range(1000):
        if state_of(process) == state:
            return True
        time.sleep(0.01)
    return False


def test_this_process_runs():
    assert state_of(this_process()) == "runs"
    assert str(os.getpid()) in this_process()["text"]


def test_a_stopped_process_has_not_ended(child):
    process = process_of(child)
    assert state_of(process) == "runs"
    os.kill(child.pid, signal.SIGSTOP)
    assert wait_for("is stopped", process)


def test_a_killed_process_has_ended_before_its_parent_looks(child):
    process = process_of(child)
    child.kill()
    assert wait_for("has ended", process)
    child.wait()
    assert state_of(process) == "has ended"


def test_another_process_with_the_same_pid_is_told_apart(child):
    assert state_of(Process(process_of(child), started="1")) == "has ended"


@pytest.mark.parametrize("unknown", [{"place": "elsewhere"}, {"started": ""}])
def test_a_process_that_cannot_be_looked_up_counts_as_running(child, unknown):
    process = Process(process_of(child), **unknown)
    child.kill()
    child.wait()
    assert state_of(process) == "runs"

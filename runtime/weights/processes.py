"""Whether a process of this host still runs, from its entry in /proc.

Nothing is known of processes of other hosts, of other pid namespaces, and without /proc: they
count as running.
"""

import os
import socket
from functools import cache
from typing import Literal, TypedDict

State = Literal["runs", "is stopped", "has ended"]


class Process(TypedDict):
    """A process, as others can recognise it."""

    text: str
    """For messages."""
    pid: int
    place: str
    """Host and pid namespace."""
    started: str
    """When, in ticks of the clock: a pid is used again."""


def this_process() -> Process:
    """The process that calls."""
    pid = os.getpid()
    state = _state(pid)
    text = f"process {pid} on {socket.gethostname()}"
    return Process(text=text, pid=pid, place=_place(), started=state[1] if state else "")


def state_of(process: Process) -> State:
    """Whether a process of this host runs; a zombie has ended."""
    if not process["started"] or process["place"] != _place():
        return "runs"
    state = _state(process["pid"])
    if state is None or state[0] in "ZX" or state[1] != process["started"]:
        return "has ended"
    return "is stopped" if state[0] in "Tt" else "runs"


@cache
def _place() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str] | None:
    """The letter of a process's state and its start time; None where there is no such process."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        try:
            text = os.read(file, 1000)
        finally:
            os.close(file)
    except OSError:
        return None
    # The name of the program, in brackets, may have spaces.
    fields = text.decode(errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]

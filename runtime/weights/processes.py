"""Whether a process of this host still runs, from its entry in /proc.

Nothing is known of processes of other hosts, of other pid namespaces, and without /proc: they
count as running.
"""

import os
import socket
from functools import cache
from pathlib import Path
from typing import TypedDict


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


def has_ended(process: Process) -> bool:
    """Whether a process of this host has ended; a zombie has."""
    if not process["started"] or process["place"] != _place():
        return False
    state = _state(process["pid"])
    return state is None or state[0] in "ZX" or state[1] != process["started"]


def is_stopped(process: Process) -> bool:
    """Whether a signal has stopped a process of this host."""
    if not process["started"] or process["place"] != _place():
        return False
    state = _state(process["pid"])
    return state is not None and state[0] in "Tt"


@cache
def _place() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str] | None:
    """The letter of a process's state and its start time; None where there is no such process."""
    try:
        # The name of the program, in brackets, may have spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]

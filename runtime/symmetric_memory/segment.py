"""A rank's segment of POSIX shared memory: made, mapped by the others, and unlinked at once.

A segment has a name only from its making until every rank has mapped it. One whose maker was
killed in between is removed by the next process that makes a segment here.
"""

import mmap
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.symmetric_memory.hosts import SHM

PREFIX = "fixpass-"


def create(num_bytes: int) -> tuple[str, Tensor]:
    """A new zeroed segment: its name, and its memory as uint8[num_bytes].

    The memory is reserved, so that no later write can fail. Raises OSError where /dev/shm has no
    room or does not exist.
    """
    remove_abandoned()
    name = f"{PREFIX}{_pid_namespace()}-{os.getpid()}-{secrets.token_hex(8)}"
    path = SHM / name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        return name, _map(descriptor, num_bytes)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def attach(name: str, num_bytes: int) -> Tensor:
    """The memory of another rank's segment as uint8[num_bytes]; raises OSError without it."""
    descriptor = os.open(SHM / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def unlink(name: str) -> None:
    """Take the name away; the memory lives as long as it is mapped."""
    (SHM / name).unlink(missing_ok=True)


def remove_abandoned() -> None:
    """Remove segments whose makers ended before every rank had mapped them."""
    for path in SHM.glob(f"{PREFIX}{_pid_namespace()}-*"):
        pid = path.name.removeprefix(PREFIX).split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def free_bytes() -> int:
    """Bytes that /dev/shm has left."""
    usage = os.statvfs(SHM)
    return usage.f_bavail * usage.f_frsize


def _map(descriptor: int, num_bytes: int) -> Tensor:
    # The tensor keeps the mapping, which is undone when the last view of it is gone.
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _pid_namespace() -> int:
    """Process ids mean something only within their namespace."""
    return os.stat("/proc/self/ns/pid").st_ino

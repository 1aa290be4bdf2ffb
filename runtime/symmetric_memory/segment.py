"""A rank's segment of POSIX shared memory: created, mapped by the other ranks, then unlinked.

A segment has a name only until every rank has mapped it. If its process was killed before, the
next process that creates a segment removes it, unless it belongs to another user.
"""

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

SHM = Path("/dev/shm")
PREFIX = "fixpass-"


def this_host() -> str:
    """Equal for two processes that can share memory: one kernel, and one /dev/shm."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{SHM.stat().st_dev}"
    except OSError:
        return f"{os.uname().nodename}:no shared memory"


def create(num_bytes: int) -> tuple[str, Tensor]:
    """A new zeroed segment: its name, and its memory as uint8[num_bytes].

    The memory is reserved, so that no later write can fail. Raises OSError where /dev/shm has no
    room, does not exist or cannot be written to.
    """
    remove_abandoned()
    name = f"{PREFIX}{pid_namespace()}-{os.getpid()}-{secrets.token_hex(8)}"
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
    """Remove this user's segments whose processes ended before every rank had mapped them."""
    for path in SHM.glob(f"{PREFIX}{pid_namespace()}-*"):
        pid = path.name.removeprefix(PREFIX).split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            # A file of another user, or a folder of that name, is not ours to remove.
            with suppress(OSError):
                path.unlink()


def free_bytes() -> int:
    """Bytes that /dev/shm has left."""
    usage = os.statvfs(SHM)
    return usage.f_bavail * usage.f_frsize


def _map(descriptor: int, num_bytes: int) -> Tensor:
    # The tensor keeps the mapping, which is undone when the last view of it is gone.
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def pid_namespace() -> int:
    """Process ids mean something only within their namespace."""
    return os.stat("/proc/self/ns/pid").st_ino

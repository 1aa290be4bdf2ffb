"""A segment has a name until all have mapped it, and leaves nothing behind."""

import errno
import os
import subprocess
import sys

import pytest

from fixpass.runtime.symmetric_memory import segment
from fixpass.runtime.symmetric_memory.rendezvous import _why_no_segment


def names():
    return [name for name in os.listdir("/dev/shm") if name.startswith(segment.PREFIX)]


def test_what_one_writes_another_that_mapped_it_reads():
    name, mine = segment.create(8192)
    theirs = segment.attach(name, 8192)
    segment.unlink(name)
    mine[5] = 7
    assert theirs[5] == 7
    assert name not in names()


def test_a_segment_larger_than_the_room_is_refused_at_once_and_leaves_no_name():
    before = names()
    with pytest.raises(OSError, match=r"No space left|File too large|Invalid argument"):
        segment.create(1 << 50)
    assert names() == before


def test_two_processes_of_one_host_name_the_same_host():
    script = "from fixpass.runtime.symmetric_memory import segment; print(segment.this_host())"
    command = [sys.executable, "-P", "-W", "ignore", "-c", script]
    other = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()
    assert other == segment.this_host()
    assert ":" in other


def abandoned(name):
    """A path in /dev/shm that reads as the segment of a process that ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return segment.SHM / f"{segment.PREFIX}{segment.pid_namespace()}-{ended.pid}-{name}"


def test_a_folder_with_the_name_of_an_abandoned_segment_is_left_alone():
    folder = abandoned("folder")
    folder.mkdir()
    try:
        name, _ = segment.create(4096)
        segment.unlink(name)
        assert folder.is_dir()
    finally:
        folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_an_abandoned_segment_of_another_user_is_left_alone():
    script = (
        "from fixpass.runtime.symmetric_memory import segment; import os\n"
        "os.seteuid(65534); name, _ = segment.create(4096); segment.unlink(name); print('created')"
    )
    command = [sys.executable, "-P", "-W", "ignore", "-c", script]
    theirs = abandoned("theirs")
    theirs.touch()
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert found.stdout.strip() == "created", found.stderr
        assert theirs.exists()
    finally:
        theirs.unlink()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "/dev/shm has no room for 4096 bytes ("),
        (errno.EACCES, "no segment can be made in /dev/shm: Permission denied (/dev/shm/x)"),
        (errno.EROFS, "no segment can be made in /dev/shm: Read-only file system (/dev/shm/x)"),
        (errno.ENOENT, "no segment can be made in /dev/shm: No such file or directory ("),
    ],
)
def test_only_a_full_disk_is_called_one(number, text):
    assert _why_no_segment(OSError(number, os.strerror(number), "/dev/shm/x"), 4096).startswith(
        text
    )


def test_the_segment_of_a_process_that_was_killed_is_removed_by_the_next_that_makes_one():
    script = (
        "from fixpass.runtime.symmetric_memory import segment; import os\n"
        "print(segment.create(4096)[0], flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-P", "-W", "ignore", "-c", script]
    left = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()
    assert left in names()
    name, _ = segment.create(4096)
    segment.unlink(name)
    assert left not in names()

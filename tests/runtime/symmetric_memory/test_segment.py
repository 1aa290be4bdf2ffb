"""A segment has a name until all have mapped it, and leaves nothing behind."""

import os
import subprocess
import sys

import pytest

from fixpass.runtime.symmetric_memory import segment


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

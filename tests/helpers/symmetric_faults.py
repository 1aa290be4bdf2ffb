"""What goes wrong on ranks in the tests of symmetric memory; see `ranks.py`."""

import os
import time

import torch
import torch.distributed as dist

import fixpass.symmetric_memory as symmetric
from fixpass.runtime import extension
from fixpass.runtime.symmetric_memory import segment
from helpers.ranks import join_group


def dies_or_waits(victim, numel):
    """The victim ends in the middle of the job; the others report how they heard of it."""
    context, rank = symmetric.context(), dist.get_rank()
    context.all_reduce(torch.ones(numel))
    if rank == victim:
        os._exit(9)
    started = time.monotonic()
    try:
        context.all_reduce(torch.ones(numel))
        return "no error", 0.0, ""
    except dist.DistBackendError as error:
        first = str(error)
    seconds = time.monotonic() - started
    try:
        context.all_reduce(torch.ones(numel))
        again = "no error"
    except dist.DistBackendError as error:
        again = str(error)
    return first, seconds, again


def comes_late(late, seconds):
    """One rank does not come within the time limit."""
    context, rank = symmetric.context(), dist.get_rank()
    if rank == late:
        time.sleep(seconds)
    try:
        context.all_reduce(torch.ones(4))
    except dist.DistBackendError as error:
        return str(error)
    return "no error"


def leaves(leaver):
    """One rank gives its memory up; the next call of the others says so at once."""
    context, rank = symmetric.context(), dist.get_rank()
    context.all_reduce(torch.ones(1))
    if rank == leaver:
        context.close()
        return context.reason
    try:
        context.all_reduce(torch.ones(1))
    except dist.DistBackendError as error:
        return str(error)
    return "no error"


def rejoin(rank, size, port):
    """Destroy the process group and make it again with the ranks that are there now."""
    dist.destroy_process_group()
    join_group(rank, size, port)


def without_compiler(rank, reason):
    if dist.get_rank() == rank:
        extension.load = lambda name, **options: extension.Extension(None, reason)


def no_room():
    """/dev/shm is full for rank 1."""
    if dist.get_rank() == 1:

        def create(num_bytes):
            raise OSError(28, "No space left on device")

        segment.create = create


def another_host():
    """The odd ranks claim to be on another host."""
    if dist.get_rank() % 2:
        segment.this_host = lambda: "another"

"""What goes wrong on ranks in the tests of symmetric memory; see `ranks.py`."""

import os
import time

import torch
import torch.distributed as dist

import fixpass.symmetric_memory as symmetric
from fixpass.runtime import extension
from fixpass.runtime.symmetric_memory import groups


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


def official_ops():
    """PyTorch's own schemas on CPU."""
    symmetric.context()
    rank = dist.get_rank()
    ops, x = torch.ops.symm_mem, torch.tensor([1.0 + rank, 2.0])
    fresh = ops.one_shot_all_reduce(x, "sum", "0")
    out = torch.empty(2)
    ops.one_shot_all_reduce_out(x, "sum", "0", out)
    ops.two_shot_all_reduce_(x, "sum", "0")
    return fresh.tolist(), out.tolist(), x.tolist()


def without_compiler(reason):
    extension.load = lambda name, **options: extension.Extension(None, reason)


def no_room():
    """/dev/shm is full for rank 1."""
    if dist.get_rank() == 1:

        def create(num_bytes):
            raise OSError(28, "No space left on device")

        groups.exchange_hosts.__globals__["segment"].create = create


def another_host():
    """The odd ranks claim to be on another host."""
    if dist.get_rank() % 2:
        groups.exchange_hosts.__globals__["this_host"] = lambda: "another"

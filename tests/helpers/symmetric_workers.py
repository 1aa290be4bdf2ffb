"""What ranks do in the tests of symmetric memory; see `ranks.py`."""

import os
import random
import resource
import threading
import time
import warnings

import torch
import torch.distributed as dist

import fixpass.symmetric_memory as symmetric
from fixpass.runtime.symmetric_memory import groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(rank, numel, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(numel, generator=generator) * 8).to(dtype)


def in_rank_order(tensors):
    """The sum that every rank must get, to the bit: float32, in rank order, rounded once."""
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total.to(tensors[0].dtype)


def describe():
    context = symmetric.context()
    return context.symmetric, context.reason


def wrong_sums(sizes, seed=0):
    """The (size, dtype) whose all-reduce, or that in place, is not the sum in rank order."""
    rank, size = dist.get_rank(), dist.get_world_size()
    context = symmetric.context()
    wrong = []
    for numel in sizes:
        for dtype in DTYPES:
            want = in_rank_order([inputs(each, numel, dtype, seed) for each in range(size)])
            x = inputs(rank, numel, dtype, seed)
            got = context.all_reduce(x)
            if not (torch.equal(got, want) and torch.equal(context.all_reduce_(x), want)):
                wrong.append((numel, str(dtype)))
    return wrong


def shared_segments():
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith("fixpass-"))


def stats():
    return symmetric.context().stats()


def strided_sum():
    """A transposed input and a 0-d one: the results are dense, of the same shape."""
    context = symmetric.context()
    x = inputs(dist.get_rank(), 12, torch.float32).view(3, 4).t()
    got, scalar = context.all_reduce(x), context.all_reduce(torch.tensor(2.0))
    in_place = context.all_reduce_(x)
    return got, got.stride(), scalar, torch.equal(in_place, got) and in_place is x


def other_dtypes():
    """What is not summed in symmetric memory goes through the process group."""
    context = symmetric.context()
    whole = context.all_reduce(torch.arange(5) + dist.get_rank())
    double = context.all_reduce(torch.full((3,), 0.1, dtype=torch.float64))
    maximum = torch.ops.fixpass.all_reduce(torch.tensor([float(dist.get_rank())]), "max", "0")
    return whole, double, maximum


def raised(shape_of, dtype_of, repeat=1):
    """The errors of calls that disagree, and what a call gives after them."""
    context, rank = symmetric.context(), dist.get_rank()
    errors = []
    for _ in range(repeat):
        try:
            context.all_reduce(torch.ones(shape_of[rank], dtype=getattr(torch, dtype_of[rank])))
        except ValueError as error:
            errors.append(str(error))
    return errors, context.all_reduce(torch.ones(3)).tolist()


def resident_matmul(rows, columns):
    """A product made in the group's memory: right, and not copied to be shared."""
    context, rank = symmetric.context(), dist.get_rank()
    a = inputs(rank, rows * 8, torch.float32).view(rows, 8)
    b = inputs(rank + 10, 8 * columns, torch.float32).view(8, columns)
    before = context.stats()
    with context:
        product = a @ b
    got = context.all_reduce(product)
    after = context.stats()
    del product
    parts = [torch.empty_like(got) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, a @ b)
    staged = after.staged_bytes - before.staged_bytes
    return torch.equal(got, in_rank_order(parts)), staged, symmetric.context().stats()


def tensors_in_memory():
    """Tensors of the group's memory: given back when dropped, refused when there is no room."""
    context = symmetric.context()
    before = context.stats().heap_bytes_in_use
    x = context.empty(1000, dtype=torch.bfloat16)
    x.fill_(1)
    total = context.all_reduce(x).sum().item()
    held = context.stats().heap_bytes_in_use - before
    del x
    try:
        context.empty(1 << 30)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return total, held, context.stats().heap_bytes_in_use - before, refusal


def two_groups():
    """Two groups with the same ranks, used in turn."""
    first = symmetric.context(dist.new_group(list(range(dist.get_world_size()))))
    second = symmetric.context(dist.new_group(list(range(dist.get_world_size()))))
    results = []
    for step in range(50):
        x = torch.full((step + 1,), float(step))
        results.append((first.all_reduce(x), second.all_reduce(2 * x)))
    size = dist.get_world_size()
    return all(
        bool((one == size * step).all()) and bool((two == 2 * size * step).all())
        for step, (one, two) in enumerate(results)
    )


def remade_group():
    """A group destroyed and made again, three times: each has memory of its own."""
    sums = []
    for _ in range(3):
        group = dist.new_group(list(range(dist.get_world_size())))
        context = symmetric.context(group)
        sums.append((context.symmetric, context.all_reduce(torch.ones(4)).tolist()))
        del context
        dist.destroy_process_group(group)
        del group
    return sums


def groups_of_halves():
    """Groups of two of the four ranks each."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = symmetric.context(halves[dist.get_rank() // 2])
    return mine.all_reduce(torch.tensor([float(dist.get_rank())])).item()


def from_a_child():
    """What a forked child hears when it uses its parent's group, and that the parent goes on."""
    context = symmetric.context()
    context.all_reduce(torch.ones(1))
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            context.all_reduce(torch.ones(1))
            os.write(writing, b"no error")
        except ValueError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    heard = os.read(reading, 4096).decode()
    return heard, context.all_reduce(torch.ones(1)).item()


def from_two_threads():
    """One thread waits in an all-reduce for the other ranks; a second one is refused."""
    context, rank = symmetric.context(), dist.get_rank()
    if rank != 0:
        time.sleep(2)
        return context.all_reduce(torch.ones(1)).item(), ""
    sums = []
    first = threading.Thread(target=lambda: sums.append(context.all_reduce(torch.ones(1)).item()))
    first.start()
    time.sleep(0.5)
    try:
        context.all_reduce(torch.ones(1))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    first.join()
    return sums[0], refusal


def random_calls(count, seed):
    """Random sizes and dtypes; the number of wrong sums, and how the memory grew, in KiB."""
    rank, size = dist.get_rank(), dist.get_world_size()
    context = symmetric.context()
    draw = random.Random(seed)
    wrong, sizes = 0, []
    bases = {
        (each, dtype): inputs(each, 1 << 18, dtype, seed)
        for each in range(size)
        for dtype in DTYPES
    }
    sums = {d: in_rank_order([bases[each, d] for each in range(size)]) for d in DTYPES}
    for step in range(count):
        numel = int(2 ** draw.uniform(0, 17.99))
        dtype = draw.choice(DTYPES)
        start = draw.randrange((1 << 18) - numel)
        got = context.all_reduce(bases[rank, dtype][start : start + numel])
        wrong += not torch.equal(got, sums[dtype][start : start + numel])
        if step in (count // 10, count - 1):
            sizes.append(_resident_kib())
    return wrong, sizes[-1] - sizes[0]


def _resident_kib():
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * resource.getpagesize() // 1024


def wait_one_second():
    groups.configure(timeout=1.0)


def sum_of_ones():
    return symmetric.context().all_reduce(torch.ones(1)).item()


def groups_of_parity():
    """Ranks 0 and 2 are on one host, 1 and 3 on another."""
    sets = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    context = symmetric.context(sets[dist.get_rank() % 2])
    return context.symmetric, context.all_reduce(torch.tensor([float(dist.get_rank())])).item()

"""What each rank does in the benchmarks of all-reduce: alternatives in turn, one clock a rank.

Every batch begins at a meeting of all ranks. A sample is the batch's time over its calls, the
longest of the ranks. Nothing is judged here.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import fixpass.symmetric_memory as symmetric
from fixpass.runtime.symmetric_memory.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KIB, MIB = 1 << 10, 1 << 20
BATCH = 0.02
Samples = dict[str, list[float]]


def all_reduces(dtype_name: str, num_bytes: int, rounds: int) -> Samples:
    """Seconds of an all-reduce of `num_bytes`, by each way; `local add` moves no data."""
    dtype = DTYPES[dtype_name]
    numel = num_bytes // dtype.itemsize
    context = symmetric.context()
    assert context.symmetric, context.reason
    x, other = torch.randn(numel).to(dtype), torch.randn(numel).to(dtype)
    # All sum in place, as gloo does, and get their input anew; a way of its own says
    # what that takes.
    fill = torch.zeros(numel, dtype=dtype)
    ways: dict[str, Callable[[], object]] = {
        "fixpass": lambda: context.all_reduce_(x.copy_(fill)),
        "gloo": lambda: dist.all_reduce(x.copy_(fill)),
        "local add": lambda: torch.add(fill, other, out=x),
        "fill": lambda: x.copy_(fill),
    }
    vllm = vllm_all_reduce()
    if vllm is not None:
        ways["vllm"] = lambda: vllm(x.copy_(fill))
    samples = in_turn(ways, rounds)
    filling = samples.pop("fill")
    for name in {"fixpass", "gloo", "vllm"} & set(samples):
        samples[name] = [a - b for a, b in zip(samples[name], filling, strict=True)]
    return samples


@cache
def vllm_all_reduce() -> Callable[[Tensor], object] | None:
    """vLLM's all-reduce over shared memory, where it is installed and the processor can run it."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None or not has_avx512():
        return None
    torch.ops.load_library(Path(spec.origin).parent / "_C_AVX512.abi3.so")
    ops, name = torch.ops._C, f"benchmark-{dist.get_world_size()}"
    handle = ops.init_shm_manager(name, dist.get_world_size(), dist.get_rank(), 1)
    dist.barrier()
    ops.join_shm_manager(handle, name)
    dist.barrier()
    return lambda x: ops.shm_allreduce(handle, x)


def has_avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text()


def all_reduces_in_turn(num_bytes: int, rounds: int) -> Samples:
    """An all-reduce of all ranks, and the same additions made by one rank after the other."""
    context = symmetric.context()
    assert context.symmetric, context.reason
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [torch.randn(num_bytes // 4) for _ in range(size)]

    def alone() -> None:
        """One rank's share: its data copied in, then what it sums and what it gathers."""
        parts[0].clone()
        summed = len(parts[0]) if num_bytes <= Settings().slot_bytes else len(parts[0]) // size
        total = parts[0][:summed] + parts[1][:summed]
        for part in parts[2:]:
            total += part[:summed]
        if summed < len(parts[0]):
            parts[1].clone()

    samples = in_turn({"fixpass": lambda: context.all_reduce(parts[rank])}, rounds)
    samples["in turn"] = []
    for _ in range(rounds):
        taken = 0.0
        for turn in range(size):
            dist.barrier()
            if turn == rank:
                start = time.perf_counter()
                for _ in range(10):
                    alone()
                taken = (time.perf_counter() - start) / 10
        samples["in turn"].append(_over_ranks(taken, dist.ReduceOp.SUM))
    return samples


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> Samples:
    """Seconds a call of each way, one sample a round, whose calls take about BATCH seconds."""
    calls = {name: _calls_for(run) for name, run in ways.items()}
    samples: Samples = {name: [] for name in ways}
    names = list(ways)
    for index in range(rounds):
        for name in names if index % 2 else reversed(names):
            samples[name].append(_batch(ways[name], calls[name]))
    return samples


def _calls_for(run: Callable[[], object]) -> int:
    """As many calls as take about BATCH seconds: all ranks say the same."""
    _batch(run, 3)
    return max(2, min(2000, int(BATCH / _batch(run, 10))))


def _batch(run: Callable[[], object], calls: int) -> float:
    """Seconds a call, of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return _over_ranks((time.perf_counter() - start) / calls, dist.ReduceOp.MAX)


def _over_ranks(seconds: float, op: dist.ReduceOp.RedOpType) -> float:
    shared: Tensor = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(shared, op)
    return float(shared.item())

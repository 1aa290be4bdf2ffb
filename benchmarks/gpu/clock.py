"""Times on a GPU: of the device through CUDA graphs, of the host without waiting, and on the wall.

On the CPU each gives the wall time of one call, which shows that the code runs and nothing else.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Run = Callable[[], object]
CACHE_BYTES = 256 << 20  # more than the second-level cache of today's devices
MAX_SETS = 16


def wait(device: str) -> None:
    """Until the device has done all work."""
    if device != "cpu":
        torch.cuda.synchronize()


def wall_seconds(run: Run, device: str, repeats: int = 7, calls: int = 1) -> float:
    """Median seconds of one call: the host's clock around `calls` calls and one wait."""
    if device == "cpu":
        repeats = calls = 1
    run()
    wait(device)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait(device)
        samples.append((time.perf_counter() - started) / calls)
    return median(samples)


def host_seconds(run: Run, device: str, calls: int = 200, repeats: int = 5) -> float:
    """Median seconds that the host spends on a call whose device work is shorter than that."""
    if device == "cpu":
        calls, repeats = 2, 1
    for _ in range(3):
        run()
    samples = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - started) / calls)
    wait(device)
    return median(samples)


def device_seconds(runs: Sequence[Run], device: str, repeats: int = 7) -> float:
    """Median seconds of one run on the device: all runs in turn, replayed as one CUDA graph.

    Args:
        runs: the same work on different memory, more than the second-level cache together.
        device: "cuda" or "cpu".
        repeats: samples of about 20 ms each.

    """
    if device == "cpu":
        return wall_seconds(runs[0], device)
    graph = captured(runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times

    sample(2)
    times = max(1, min(200, int(0.02 / max(sample(1), 1e-6))))
    return median(sample(times) for _ in range(repeats)) / len(runs)


def captured(runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
    """The runs as one CUDA graph; each has run once before on the side."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def sets_for(num_bytes: int, device: str) -> int:
    """How many sets of operands exceed the second-level cache together."""
    if device == "cpu":
        return 1
    return max(1, min(MAX_SETS, -(-CACHE_BYTES // max(1, num_bytes))))

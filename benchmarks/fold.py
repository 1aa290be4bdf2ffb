"""Load into a shuffled weight, and shuffle one in place, beside the ways that make a second copy.

CPU seconds of one thread, all ways in each round. Memory is that of a process for each way: the
highest resident size over that before, with everything in place that the way is given.
"""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import interleave
from fixpass.weights import checkpoint_layout, reset_layout, set_layout

ABOUT = (
    "A bfloat16 weight in aiter's 16 x 16 layout. `load` brings a tensor of the checkpoint into "
    "it: through the load window, or as engines do, by a copy, a shuffle into new memory and a "
    "copy back. `shuffle` turns values that are there, in place or through new memory. All ways "
    "give the same bits. Peak is over what the way was given."
)
SHAPE, QUICK_SHAPE, EXPERTS = (4096, 14336), (256, 512), 8
MIB = 1 << 20


def run(quick: bool) -> Result:
    result = Result("fold", ABOUT, quick=quick)
    shape = QUICK_SHAPE if quick else SHAPE
    _add(result, Weight(shape, quick), LOADS | SHUFFLES, quick, 31)
    _add(result, Weight((EXPERTS, *shape), quick), LOADS, quick, 11)
    return result


def shuffled(weight: Tensor) -> Tensor:
    """aiter's shuffle into new memory."""
    cell = 16 // weight.element_size()
    bands = weight.view(-1, weight.shape[-2] // 16, 16, weight.shape[-1] // (2 * cell), 2, cell)
    return bands.permute(0, 1, 3, 4, 2, 5).contiguous().view(weight.shape)


class Weight:
    """A folded parameter, a plain one of the same shape, and a tensor of the checkpoint."""

    def __init__(self, shape: tuple[int, ...], quick: bool) -> None:
        torch.manual_seed(0)
        self.loaded = torch.randn(shape).bfloat16()
        self.plain = nn.Parameter(self.loaded.clone(), requires_grad=False)
        self.folded = nn.Parameter(self.loaded.clone(), requires_grad=False)
        set_layout(self.folded, "aiter_16x16")

    def load_plain(self) -> None:
        self.plain.data.copy_(self.loaded)

    def load_folded(self) -> None:
        with checkpoint_layout([self.folded]):
            self.folded.data.copy_(self.loaded)

    def load_then_shuffle(self) -> None:
        self.plain.data.copy_(self.loaded)
        self.plain.data.copy_(shuffled(self.plain.data))

    def shuffle_in_place(self) -> None:
        # Two: there and back again, each of the same work.
        reset_layout(self.folded)
        set_layout(self.folded, "aiter_16x16")

    def shuffle_and_copy(self) -> None:
        for _ in range(2):
            self.plain.data.copy_(shuffled(self.plain.data))


Way = Callable[[Weight], None]
LOADS: dict[str, Way] = {
    "plain copy_": Weight.load_plain,
    "load, fixpass": Weight.load_folded,
    "load, copy and shuffle": Weight.load_then_shuffle,
}
SHUFFLES: dict[str, Way] = {
    "shuffle twice, fixpass": Weight.shuffle_in_place,
    "shuffle twice, new memory": Weight.shuffle_and_copy,
}


def _add(result: Result, weight: Weight, ways: dict[str, Way], quick: bool, rounds: int) -> None:
    _check_bits(weight)
    alternatives = {name: lambda way=way: way(weight) for name, way in ways.items()}
    samples = interleave(alternatives, 3 if quick else rounds)
    shape = tuple(weight.loaded.shape)
    what = "experts" if len(shape) == 3 else "one weight"
    peaks = {name: _peak(name, shape) for name in ways}
    for name, taken in samples.items():
        result.rows.append(
            {
                "weight": f"{list(shape)}",
                "way": name,
                "CPU ms": spread(taken).scaled(1e3),
                "/ plain copy_": ratios(taken, samples["plain copy_"]),
                "peak MiB": peaks[name],
            }
        )
    bound = 2.0 if what == "experts" else 1.5
    mine, plain = samples["load, fixpass"], samples["plain copy_"]
    seed = samples["load, copy and shuffle"]
    add = result.checks.append
    add(Check(f"{what}: load / plain copy_", ratios(mine, plain).median, bound))
    add(Check(f"{what}: load, peak MiB", peaks["load, fixpass"], 4.0))
    if what == "one weight":
        faster = ratios(seed, mine).median
        add(Check("copy and shuffle / load", faster, 6.0, at_least=True))
        turns = ratios(samples["shuffle twice, new memory"], samples["shuffle twice, fixpass"])
        add(Check("shuffle in new memory / in place", turns.median, 5.0, at_least=True))
        add(Check("shuffle in place, peak MiB", peaks["shuffle twice, fixpass"], 4.0))


def _check_bits(weight: Weight) -> None:
    """All ways give the same bits; they are timed after."""
    weight.load_folded()
    assert torch.equal(weight.folded, shuffled(weight.loaded))
    weight.load_then_shuffle()
    assert torch.equal(weight.plain, weight.folded)


def _peak(name: str, shape: tuple[int, ...]) -> float:
    """MiB that a way needs over what it is given, in a process of its own."""
    print(f"fold: memory of {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-W", "ignore", "-c", "import sys; sys.path.insert(0, '.');"]
    command[-1] += f"from benchmarks.fold import peak; peak({name!r}, {shape!r})"
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    return float(out.split()[-1])


def peak(name: str, shape: tuple[int, ...]) -> None:
    """Print what one way needs; for `_peak`. The same on a small weight pays for imports."""
    torch.set_num_threads(1)
    ways = LOADS | SHUFFLES
    ways[name](Weight(QUICK_SHAPE, True))
    weight = Weight(shape, False)
    gc.collect()
    before = highest = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        ways[name](weight)
    done.set()
    watcher.join()
    print((highest - before) / MIB)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

"""Give a live model the weights of a checkpoint again, in each mode of an update.

2 GB in five shards, in the page cache, into parameters that are in use; and a mixture of experts
of some thousand small tensors, for what a tensor costs. Times are on the wall, as threads of our
own read, all ways in each round. Memory is that of a process for each way.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.load import build
from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import interleave
from benchmarks.ways import check, peak
from fixpass.weights import load, reload

ABOUT = (
    "Seconds on the wall to give a live Llama (bfloat16, safetensors, warm page cache) other "
    "weights. `memcpy` copies the same bytes from memory that was touched. `load` is the load that "
    "promises nothing where a file breaks while it is read; the modes leave the old weights then. "
    "held back: how long calls of the model wait. Peak is over the model; mode double keeps its "
    "second set of memory between updates, which is in the peak. The experts are 16 x 16 in "
    "float32, with a file of as many names."
)
MODES = ("double", "journal", "staged")
LAYERS, EXPERTS = 24, 66  # 4,752 matrices of experts, and 48 other tensors


def run(quick: bool) -> Result:
    result = Result("reload", ABOUT, quick=quick)
    with tempfile.TemporaryDirectory(prefix="fixpass-bench-") as folder:
        _large(result, Path(folder), quick)
    with tempfile.TemporaryDirectory(prefix="fixpass-bench-") as folder:
        _many(result, Path(folder), quick)
    return result


Way = Callable[[Any, Path], float]


def _reload(mode: str, threads: int) -> Way:
    def way(model: Any, folder: Path) -> float:
        return reload(model, folder, mode, threads=threads, progress=False).closed  # type: ignore[arg-type]

    return way


def _load(threads: int) -> Way:
    def way(model: Any, folder: Path) -> float:
        return load(model, folder, threads=threads, progress=False).seconds

    return way


def _load_file(model: Any, folder: Path) -> float:
    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)
    return 0.0


WAYS: dict[str, Way] = {
    **{
        f"reload, {mode}, {n} thread{'s'[: n - 1]}": _reload(mode, n)
        for mode in MODES
        for n in (1, 2)
    },
    **{f"load, {n} thread{'s'[: n - 1]}": _load(n) for n in (1, 2)},
    "load_file + load_state_dict": _load_file,
}


def _large(result: Result, folder: Path, quick: bool) -> None:
    model = build(quick)
    model.save_pretrained(folder, max_shard_size="2MB" if quick else "450MB")
    samples, held = _timed(model, folder, 3 if quick else 7)
    peaks = {name: peak(__name__, name, folder, quick)[1] for name in WAYS}
    for name, taken in samples.items():
        result.rows.append(
            {
                "what": "2 GB" if not quick else "small",
                "way": name,
                "seconds": spread(taken),
                "/ memcpy": ratios(taken, samples["memcpy"]),
                "us a tensor": "",
                "held back, s": spread(held[name]) if held.get(name) else "",
                "peak MiB": peaks.get(name, ""),
            }
        )
    for threads, bound in ((1, 1.7), (2, 1.4)):
        # The others pay for memory or a file of their own: what they cost is in their rows.
        name = f"reload, double, {threads} thread{'s'[: threads - 1]}"
        ratio = ratios(samples[name], samples["memcpy"]).median
        result.checks.append(Check(f"{name} / memcpy", ratio, bound))


def _many(result: Result, folder: Path, quick: bool) -> None:
    model = experts(2 if quick else LAYERS)
    state = dict(model.state_dict())
    names = list(state)
    for index in range(4):
        part = {name: state[name].clone() for name in names[index::4]}
        save_file(part, folder / f"model-{index}.safetensors")
    samples, held = _timed(model, folder, 3 if quick else 7)
    for name, taken in samples.items():
        each = spread(taken).scaled(1e6 / len(names))
        result.rows.append(
            {
                "what": f"{len(names):,} tensors",
                "way": name,
                "seconds": spread(taken),
                "/ memcpy": "",
                "us a tensor": each,
                "held back, s": spread(held[name]) if held.get(name) else "",
                "peak MiB": "",
            }
        )
        if name.startswith("reload") and name.endswith("1 thread"):
            result.checks.append(Check(f"{name}: us a tensor", each.median, 5.0))


def experts(layers: int) -> nn.Module:
    """Modules with many small parameters, each of its own."""

    def expert() -> nn.ModuleDict:
        return nn.ModuleDict(
            {name: nn.Linear(16, 16, bias=False) for name in ("gate", "up", "down")}
        )

    blocks = [
        nn.ModuleDict(
            {
                "experts": nn.ModuleList(expert() for _ in range(EXPERTS)),
                "norm": nn.LayerNorm(16, bias=False),
                "router": nn.Linear(16, EXPERTS, bias=False),
            }
        )
        for _ in range(layers)
    ]
    return nn.ModuleList(blocks).requires_grad_(False)


def _timed(
    model: Any, folder: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    for name, way in WAYS.items():
        check(name, model, way, folder)
    pairs = [(param.detach(), param.detach().clone()) for param in model.parameters()]
    held: dict[str, list[float]] = {name: [] for name in WAYS if name.startswith("reload")}

    def timed(name: str, way: Way) -> None:
        closed = way(model, folder)
        if name in held:
            held[name].append(closed)

    alternatives: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [target.copy_(source) for target, source in pairs]
    }
    for name, way in WAYS.items():
        alternatives[name] = lambda name=name, way=way: timed(name, way)
    return interleave(alternatives, rounds, clock=time.perf_counter), held

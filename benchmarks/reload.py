"""Give a live model the weights of a checkpoint again, in each mode of an update.

2 GB in five shards, in the page cache, into parameters that are in use. And a mixture of experts of
some thousand small tensors, for what a tensor costs: from two folders in turn that differ in values
alone, and from folders of which none has the headers of the last, so that each reload is planned
anew. Times are on the wall, as threads of our own read, all ways in each round. Memory is that of a
process for each way.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.load import build
from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import interleave
from benchmarks.ways import check, peak
from fixpass.weights import load, reload

ABOUT = (
    "Seconds on the wall to give {what} other weights, from safetensors in a warm page cache. "
    "`memcpy` copies the same bytes from memory that was touched. `load` is the load that promises "
    "nothing where a file breaks while it is read; the modes leave the old weights then. held "
    "back: how long calls of the model wait. Peak is over the model; mode double_buffer keeps its "
    "second set of memory between updates, which is in the peak."
)
MANY = (
    "The files of two folders in turn differ in values alone; `planned anew`: no reload's files "
    "have the headers of the last. State dicts and iterators are loaded in runs of their own: of "
    "each model the plan of the last reload is kept, and no more. An iterator's tensors are copied "
    "as they come; in mode double_buffer they go through a temporary file."
)
MODES = ("double_buffer", "undo_log", "buffered")
STATE_MODES = ("double_buffer", "buffered")
LAYERS, EXPERTS = 24, 66  # 4,752 matrices of experts, and 48 other tensors


def run(quick: bool) -> Result:
    result = Result("reload", ABOUT.format(what="a live Llama (bfloat16)"), quick=quick)
    with tempfile.TemporaryDirectory(prefix="fixpass-bench-") as folder:
        _large(result, Path(folder), quick)
    return result


def run_many(quick: bool) -> Result:
    about = ABOUT.format(what="4,800 tensors of experts (16 x 16, float32)")
    result = Result("reload-many", f"{about} {MANY}", quick=quick)
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
    for name, way in WAYS.items():
        check(name, model, way, folder)
    samples, held = _timed(model, folder, WAYS, 3 if quick else 7)
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
        name = f"reload, double_buffer, {threads} thread{'s'[: threads - 1]}"
        ratio = ratios(samples[name], samples["memcpy"]).median
        result.checks.append(Check(f"{name} / memcpy", ratio, bound))


def _many(result: Result, folder: Path, quick: bool) -> None:
    model = experts(2 if quick else LAYERS)
    count = len(_write(model, folder / "0", 4, 0.0))
    for index, files in enumerate((4, 4, 2, 3, 5, 6)):
        _write(model, folder / str(index), files, float(index))
    for name, way in WAYS.items():
        check(name, model, way, folder / "0")
    ways = {
        name: _in_turn(way, folder, ("0", "1"))
        for name, way in WAYS.items()
        if name != "load_file + load_state_dict"
    }
    for mode, names in (("double_buffer", ("2", "3")), ("buffered", ("4", "5"))):
        ways[f"reload, {mode}, 1 thread, planned anew"] = _in_turn(_reload(mode, 1), folder, names)
    ways["load_file + load_state_dict"] = _in_turn(_load_file, folder, ("0", "1"))
    samples, held = _timed(model, folder, ways, 3 if quick else 11)
    states = [_state(folder / name) for name in ("0", "1")]
    ways = {
        f"reload of {what}, {mode}, 1 thread": _of_tensors(mode, states, give)
        for what, give in (("a state dict", dict), ("an iterator", _one_by_one))
        for mode in STATE_MODES
    }
    for name, way in ways.items():
        more, held_more = _timed(model, folder, {name: way}, 3 if quick else 11)
        samples[name], held[name] = more[name], held_more[name]
    for name, taken in samples.items():
        each = spread(taken).scaled(1e6 / count)
        result.rows.append(
            {
                "what": f"{count:,} tensors",
                "way": name,
                "seconds": spread(taken),
                "/ memcpy": "",
                "us a tensor": each,
                "held back, s": spread(held[name]) if held.get(name) else "",
                "peak MiB": "",
            }
        )
        if name.startswith("reload") and name.endswith("1 thread"):
            bound = 30.0 if "planned anew" in name else 15.0
            result.checks.append(Check(f"{name}: us a tensor", each.median, bound))


def _write(model: nn.Module, folder: Path, files: int, more: float) -> list[str]:
    """A checkpoint of the model in that many files, with `more` added to its values; the names."""
    folder.mkdir(exist_ok=True)
    state = dict(model.state_dict())
    for index in range(files):
        part = {name: state[name] + more for name in list(state)[index::files]}
        save_file(part, folder / f"model-{index}.safetensors")
    return list(state)


def _state(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.iterdir()) for k, v in load_file(file).items()}


def _of_tensors(
    mode: str, states: Sequence[dict[str, Tensor]], give: Callable[[dict[str, Tensor]], Any]
) -> Way:
    """Reloads of a model from tensors in memory, each time from others."""
    turn = cycle(states)
    return lambda model, _: reload(model, give(next(turn)), mode, threads=1, progress=False).closed  # type: ignore[arg-type]


def _one_by_one(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from state.items()


def _in_turn(way: Way, folder: Path, names: Sequence[str]) -> Way:
    """The way, with another folder at each call."""
    folders = cycle(names)
    return lambda model, _: way(model, folder / next(folders))


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
    model: Any, folder: Path, ways: Mapping[str, Way], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    pairs = [(param.detach(), param.detach().clone()) for param in model.parameters()]
    held: dict[str, list[float]] = {name: [] for name in ways if name.startswith("reload")}

    def timed(name: str, way: Way) -> None:
        closed = way(model, folder)
        if name in held:
            held[name].append(closed)

    alternatives: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [target.copy_(source) for target, source in pairs]
    }
    for name, way in ways.items():
        alternatives[name] = lambda name=name, way=way: timed(name, way)
    return interleave(alternatives, rounds, clock=time.perf_counter), held

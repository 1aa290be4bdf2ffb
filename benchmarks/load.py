"""Load a checkpoint of 2 GB in five shards into parameters that are there, beside other ways.

The files are in the page cache. Times are on the wall, all ways in each round. Memory is that of a
process for each way: the highest resident size over that with the parameters in place, pages of
mapped files included, and how much of it is the process's own. fastsafetensors takes part where it
is installed.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import interleave
from benchmarks.ways import Way, check, peak

ABOUT = (
    "Seconds on the wall to load a Llama checkpoint (bfloat16, safetensors, warm page cache) into "
    "the parameters of a model that is there, and what a process needs for it over the parameters. "
    "`from_pretrained` alone makes parameters that are pages of the files and reads nothing yet; "
    "its row copies them into the "
    "model's, as the others do. A load takes as many threads as there are processors, up to 4, "
    "where it is not told; torch has one in the rows that do not say."
)
BOUND, STAGING = 1.0, 64.0
FULL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


def run(quick: bool) -> Result:
    with tempfile.TemporaryDirectory(prefix="fixpass-bench-") as folder:
        return _run(quick, Path(folder))


def _run(quick: bool, folder: Path) -> Result:
    result = Result("load", ABOUT, quick=quick)
    model = build(quick)
    model.save_pretrained(folder, max_shard_size="2MB" if quick else "450MB")
    for name, way in WAYS.items():
        check(name, model, way, folder)
    targets = [(param.detach(), param.detach().clone()) for param in model.parameters()]
    alternatives: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [target.copy_(source) for target, source in targets]
    }
    for name, way in WAYS.items():
        alternatives[name] = lambda way=way: way(model, folder)
    samples = interleave(alternatives, 3 if quick else 21, clock=time.perf_counter)
    num_bytes = sum(target.nbytes for target, _ in targets)
    targets.clear()
    others = [name for name in WAYS if not name.startswith("fixpass")]
    best = min(others, key=lambda name: spread(samples[name]).median)
    memory = {name: peak(__name__, name, folder, quick) for name in WAYS}
    for name, taken in samples.items():
        highest, own = memory.get(name, (0.0, 0.0))
        result.rows.append(
            {
                "way": name,
                "seconds": spread(taken),
                "GB/s": num_bytes / 1e9 / spread(taken).median,
                "/ memcpy": ratios(taken, samples["memcpy"]),
                f"{best} / this": ratios(samples[best], taken),
                "peak MiB over parameters": highest if name in memory else "",
                "of it the process's own": own if name in memory else "",
            }
        )
    _add_checks(result, samples, memory, best)
    result.about += (
        f" {num_bytes / 1e9:.3f} GB, {len(list(model.parameters()))} tensors, "
        f"{len(list(folder.glob('*.safetensors')))} shards."
    )
    return result


def _add_checks(
    result: Result,
    samples: dict[str, list[float]],
    memory: dict[str, tuple[float, float]],
    best: str,
) -> None:
    others = [name for name in memory if not name.startswith("fixpass")]
    for name in ("fixpass, 1 thread", "fixpass, 2 threads"):
        faster = ratios(samples[best], samples[name]).median
        result.checks.append(
            Check(f"{name}: times as fast as {best}", faster, BOUND, at_least=True)
        )
        highest = memory[name][0]
        least = min(memory[other][0] for other in others)
        result.checks.append(Check(f"{name}: peak MiB, the least of the others", highest, least))
        result.checks.append(Check(f"{name}: peak MiB over the parameters", highest, STAGING))


def build(quick: bool) -> Any:
    """A Llama of random weights; 2.1 GB in bfloat16."""
    import transformers

    config = transformers.LlamaConfig(
        **(QUICK if quick else FULL), num_attention_heads=16, vocab_size=1000 if quick else 32000
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def _fixpass(threads: int) -> Way:
    def way(model: Any, folder: Path) -> None:
        from fixpass.weights import load

        load(model, folder, threads=threads, progress=False)

    return way


def _load_state_dict(threads: int) -> Way:
    def way(model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        torch.set_num_threads(threads)
        for file in sorted(folder.glob("*.safetensors")):
            model.load_state_dict(load_file(file), strict=False)
        torch.set_num_threads(1)

    return way


def _from_pretrained(model: Any, folder: Path) -> None:
    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):
        other = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    model.load_state_dict(other.state_dict())


def _fastsafetensors(model: Any, folder: Path) -> None:
    library = importlib.import_module("fastsafetensors")
    targets = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with library.fastsafe_open([str(file)], nogds=True, device="cpu") as source:
            for name in source.keys():  # noqa: SIM118
                targets[name].copy_(source.get_tensor(name))


WAYS: dict[str, Way] = {
    "fixpass, 1 thread": _fixpass(1),
    "fixpass, 2 threads": _fixpass(2),
    "load_file + load_state_dict": _load_state_dict(1),
    "load_file + load_state_dict, 2 threads": _load_state_dict(2),
    "from_pretrained + copy": _from_pretrained,
}
if find_spec("fastsafetensors"):
    WAYS["fastsafetensors + copy_"] = _fastsafetensors

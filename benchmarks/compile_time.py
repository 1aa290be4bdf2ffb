"""Compile time of fixpass over Inductor's, with empty caches and with full ones.

Each sample is a process of its own; the backends take turns. Cold samples get a new cache folder
each; the first of them is kept, and warm samples are later processes with that folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import Check, Result, ratios, spread

ABOUT = (
    "Seconds from `torch.compile` to the first result, for the Qwen3 of `make demo` ({} layers, "
    "packed QKV), each sample in a process of its own. CPU seconds include the C++ compiler's."
)
BACKENDS = ("fixpass", "inductor")
BOUNDS = {"cold": 1.05, "warm": 1.10}
ROOT = Path(__file__).resolve().parents[1]
Sample = Mapping[str, Any]


def run(quick: bool) -> Result:
    num_layers = 1 if quick else 4
    repeats = {"cold": 1, "warm": 2} if quick else {"cold": 5, "warm": 12}
    result = Result("compile-time", ABOUT.format(num_layers), quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        samples = _samples(Path(folder), num_layers, repeats)
    for state, bound in BOUNDS.items():
        ours, theirs = (samples[state, backend] for backend in BACKENDS)
        result.rows.append(_row(state, ours, theirs))
        measured = ratios([s["cpu"] for s in ours], [s["cpu"] for s in theirs])
        result.checks.append(Check(f"{state}, fixpass / inductor", measured.median, bound))
    ours = samples["warm", "fixpass"]
    missed = sum(s["counters"][f"{cache}_miss"] for s in ours for cache in _CACHES)
    result.checks.append(Check("cache misses of all warm fixpass processes", missed, 0))
    hits = min(s["counters"]["autograd_cache_hit"] for s in ours)
    claim = "AOTAutograd cache hits of each warm fixpass process"
    result.checks.append(Check(claim, hits, 1, at_least=True))
    return result


_CACHES = ("fxgraph_cache", "autograd_cache")


def _samples(
    folder: Path, num_layers: int, repeats: Mapping[str, int]
) -> dict[tuple[str, str], list[Sample]]:
    """All samples by state and backend; every other round takes the backends backwards."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    for state in ("cold", "warm"):
        for index in range(repeats[state]):
            for backend in BACKENDS if index % 2 else BACKENDS[::-1]:
                kept = folder / backend / str(index if state == "cold" else 0)
                sample = _compile_once(backend, num_layers, kept)
                samples.setdefault((state, backend), []).append(sample)
                if sample["sources"] != next(iter(samples.values()))[0]["sources"]:
                    raise RuntimeError("fixpass's sources were edited while it was measured")
                _progress(state, index + 1, repeats[state], backend, sample)
    return samples


def _compile_once(backend: str, num_layers: int, folder: Path) -> Sample:
    environ = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        # C++ is compiled by children of the process that is measured, not by a pool's.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.compile_once", backend, str(num_layers)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    sample: Sample = json.loads(done.stdout.splitlines()[-1])
    return sample


def _row(state: str, ours: list[Sample], theirs: list[Sample]) -> dict[str, Any]:
    row: dict[str, Any] = {"caches": state}
    for clock in ("cpu", "wall"):
        pair = [[s[clock] for s in samples] for samples in (ours, theirs)]
        row[f"{clock} s, inductor"], row[f"{clock} s, fixpass"] = spread(pair[1]), spread(pair[0])
        row[f"{clock}, fixpass / inductor"] = ratios(*pair)
    for name, samples in (("inductor", theirs), ("fixpass", ours)):
        totals = {cache: _hits(samples, cache) for cache in _CACHES}
        row[f"hits, {name}"] = ", ".join(f"{cache} {hits}" for cache, hits in totals.items())
    return row


def _hits(samples: list[Sample], cache: str) -> str:
    """Hits of lookups, over all samples."""
    counts = [sum(s["counters"][f"{cache}_{kind}"] for s in samples) for kind in _KINDS]
    return f"{counts[0]} of {sum(counts)}"


_KINDS = ("hit", "miss", "bypass")


def _progress(state: str, index: int, count: int, backend: str, sample: Sample) -> None:
    spent = f"{sample['cpu']:.2f} s CPU, {sample['wall']:.2f} s"
    print(f"compile-time: {state} {index}/{count} {backend}: {spent}", file=sys.stderr, flush=True)

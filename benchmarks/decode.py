"""Tokens a second of `generate` on CPU: eager, Inductor, Inductor with freezing, fixpass.

Each way has its own process. All compile first, then run in turn, so that what slows one down slows
the others too. The clock is wall time: threads of a decode step wait for memory together. A full
run keeps each finished case in build/decode-cases.jsonl, and a run after it goes on from there.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from benchmarks.decode_worker import FAMILIES, PREFILL, WAYS, Case, Job, serve
from benchmarks.results import Check, Result, ratios, spread

ABOUT = (
    "Random models of six layers, `generate` with a prompt of 4 tokens, greedy. Batch: sequences "
    "decoded together. Prefill: one forward of 512 tokens. Tokens a second are those of all "
    "sequences. Memory: the largest resident set of a process that compiled and ran all of a case."
)
# Sequences -> the most that fixpass / Inductor may take, in float32 and in bfloat16.
BOUNDS = {1: (0.55, 0.70), 4: (0.75, 0.90), 16: (1.0, 1.0)}
FREEZING_BOUND, PREFILL_BOUND, MEMORY_BOUND = 0.75, 1.02, 1.01
JOBS = (
    Job("static", 1, 24),
    Job("dynamic", 1, 24),
    Job("static", 4, 12),
    Job("static", 16, 12),
    Job("", 1, PREFILL),
)
FINISHED = Path(__file__).resolve().parents[1] / "build/decode-cases.jsonl"
Samples = dict[str, dict[str, list[float]]]
"""Job -> way -> seconds. "memory" -> way -> bytes."""


def run(quick: bool) -> Result:
    result = Result("decode", ABOUT, quick=quick)
    for case in _cases(quick):
        samples = {} if quick else _finished(case)
        if not samples:
            jobs = (JOBS[0], JOBS[3]) if quick else JOBS
            samples = _measure(case, jobs, rounds=3 if quick else 7)
            if not quick:
                _keep(case, samples)
        _report(result, case, samples)
    result.figure = lambda folder: _plot(result, folder)
    if not quick:
        FINISHED.unlink()
    return result


def _cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield Case("Qwen3", 1024, "float32", 1)
        yield Case("Qwen3", 1024, "bfloat16", 2)
        return
    order = product((1024, 2048), FAMILIES, ("float32", "bfloat16"), (1, 2))
    for width, name, dtype, threads in order:
        yield Case(name, width, dtype, threads)


def _measure(case: Case, jobs: tuple[Job, ...], rounds: int) -> Samples:
    context = get_context("spawn")
    workers = {}
    for way in WAYS:
        mine, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, case, way), daemon=True).start()
        theirs.close()
        workers[way] = mine
    samples: Samples = {str(job): {way: [] for way in WAYS} for job in jobs}
    for job in jobs:
        # The first call compiles, on all cores, and so may the second: a size became a symbol.
        for _ in range(2):
            for worker in workers.values():
                worker.send(job)
            for worker in workers.values():
                worker.recv()
        for index in range(rounds):
            for way in WAYS if index % 2 else reversed(WAYS):
                workers[way].send(job)
                samples[str(job)][way].append(workers[way].recv())
    for worker in workers.values():
        worker.send(None)
    samples["memory"] = {way: [float(worker.recv())] for way, worker in workers.items()}
    return samples


def _finished(case: Case) -> Samples:
    """What an interrupted run measured, or nothing."""
    lines = FINISHED.read_text().splitlines() if FINISHED.exists() else []
    for kept in map(json.loads, lines):
        if kept["case"] == asdict(case):
            samples: Samples = kept["samples"]
            return samples
    return {}


def _keep(case: Case, samples: Samples) -> None:
    FINISHED.parent.mkdir(exist_ok=True)
    with FINISHED.open("a") as file:
        file.write(json.dumps({"case": asdict(case), "samples": samples}) + "\n")


def _report(result: Result, case: Case, samples: Samples) -> None:
    threads = f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    model = f"{case.name}, {case.width} wide, {case.dtype}, {threads}"
    memory = samples["memory"]
    for job in JOBS:
        taken = samples.get(str(job), {})
        for way, seconds in taken.items():
            result.rows.append(
                {
                    "model": model,
                    "job": str(job),
                    "way": way,
                    "tokens/s": spread([job.batch * job.tokens / each for each in seconds]),
                    "time / Inductor": ratios(seconds, taken["Inductor"]),
                    "MiB": memory[way][0] / 2**20,
                }
            )
        if taken:
            _check(result, f"{model}, {job}", case, job, taken)
    claim = f"{model}, memory: fixpass / Inductor"
    used = memory["fixpass"][0] / memory["Inductor"][0]
    result.checks.append(Check(claim, used, MEMORY_BOUND))


def _check(result: Result, name: str, case: Case, job: Job, taken: dict[str, list[float]]) -> None:
    bound = BOUNDS[job.batch][case.dtype == "bfloat16"] if job.cache else PREFILL_BOUND
    bounds = {"Inductor": bound}
    if job.cache and job.batch == 1:
        bounds["freezing"] = FREEZING_BOUND
    for other, most in bounds.items():
        ratio = ratios(taken["fixpass"], taken[other]).median
        result.checks.append(Check(f"{name}: fixpass / {other}", ratio, most))


def _plot(result: Result, folder: Path) -> None:
    """Each model's time over Inductor's, one panel a job, one mark a way."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    jobs = list(dict.fromkeys(row["job"] for row in result.rows))
    models = list(dict.fromkeys(row["model"] for row in result.rows))
    size = (2.2 * len(jobs) + 3, 0.2 * len(models) + 1.5)
    figure, axes = pyplot.subplots(1, len(jobs), figsize=size, sharey=True, squeeze=False)
    for axis, job in zip(axes[0], jobs, strict=True):
        for way, mark in zip(WAYS, ".|x*", strict=True):
            rows = [row for row in result.rows if (row["job"], row["way"]) == (job, way)]
            times = [row["time / Inductor"].median for row in rows]
            axis.plot(times, [row["model"] for row in rows], mark, label=way)
        axis.set(title=job, xlabel="time / Inductor")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(folder / f"{result.name}.svg", metadata={"Date": None})
    pyplot.close(figure)

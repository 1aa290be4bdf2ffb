"""vLLM on CPU with fixpass and without: throughput with one rank and with two, and start-up time.

The engines that are compared are alive at the same time and take turns, a round of requests each.
Starts take turns too, each in a process of its own. It needs the environment that `make engines`
builds; the checkpoint is random and made on the spot.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Check, Result, ratios, spread

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / ".engines/vllm/bin/python"
SERVING = (
    "{model}: seconds for {work}, in rounds that the engines take in turn. `vllm` is vLLM as it "
    "comes, which on a processor with AVX512 has an all-reduce of its own in shared memory; "
    "`gloo` is vLLM without that one."
)
STARTING = "{model}: seconds from the first import of vLLM to a ready engine."
LLM = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 16, "seed": 0}
# name -> (ranks, environment)
THROUGHPUT: dict[int, dict[str, dict[str, str]]] = {
    1: {"vllm": {}, "fixpass": {"FIXPASS": "1"}},
    2: {"gloo": {"FIXPASS_TEST_GLOO": "1"}, "vllm": {}, "fixpass": {"FIXPASS": "1"}},
}
BOUNDS = {(1, "vllm"): 1.0, (2, "gloo"): 1.1}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    layers: int
    hidden: int
    prompts: int
    new_tokens: int
    rounds: int
    starts: int


FULL = Size(layers=8, hidden=512, prompts=64, new_tokens=16, rounds=15, starts=3)
QUICK = Size(layers=2, hidden=128, prompts=8, new_tokens=4, rounds=2, starts=1)


def run(quick: bool) -> Result:
    """Throughput."""
    with _prepared("vllm-serving", SERVING, quick) as (result, folder, job, size):
        for ranks, alternatives in THROUGHPUT.items():
            _throughput(result, folder, job, ranks, alternatives, size.rounds)
    return result


def run_starts(quick: bool) -> Result:
    """Start-up time."""
    with _prepared("vllm-start", STARTING, quick) as (result, folder, job, size):
        for ranks in (1, 2):
            for state in ("cold", "warm"):
                _starts(result, folder, job, ranks, state, size.starts)
    return result


@contextmanager
def _prepared(
    name: str, about: str, quick: bool
) -> Iterator[tuple[Result, Path, dict[str, Any], Size]]:
    if not ENGINE.exists():
        raise SystemExit(f"{name} needs vLLM's environment: make engines ENGINES=vllm")
    size = QUICK if quick else FULL
    model = (
        f"A random Qwen3 ({size.layers} layers, {size.hidden} wide, bfloat16) in vLLM 0.32 on CPU"
    )
    work = f"{size.prompts} prompts of 1 to 100 tokens and {size.new_tokens} new tokens each"
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), size)
        yield (
            Result(name, about.format(model=model, work=work), quick=quick),
            Path(folder),
            job,
            size,
        )


def _job(folder: Path, size: Size) -> dict[str, Any]:
    """The requests, and the engine's options with a checkpoint that is made here."""
    sys.path.insert(0, str(ROOT / "tests/engines"))
    import tiny

    changes = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_attention_heads": size.hidden // 64,
    }
    checkpoint = tiny.write("qwen3", folder / "checkpoint", "bfloat16", **changes)
    return {
        "llm": {**LLM, "model": checkpoint, "dtype": "bfloat16"},
        "prompts": tiny.prompts(size.prompts, 100),
        "max_tokens": size.new_tokens,
    }


class Engine:
    """A child that serves: `seconds` that it took to start, and of each `round`."""

    def __init__(self, job: Mapping[str, Any], environ: Mapping[str, str], log: Any) -> None:
        read, write = os.pipe()
        command = [str(ENGINE), "-m", "benchmarks.vllm_engine", json.dumps(job), str(write)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        self.answers = os.fdopen(read)
        self.log = log
        self.seconds: float = self._answer()["seconds"]

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the engine ended:\n{self.log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)
        self.answers.close()


@contextmanager
def _engine(
    folder: Path, job: Mapping[str, Any], ranks: int, environ: Mapping[str, str], caches: str
) -> Iterator[Engine]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FIXPASS", "VLLM"))}
    environment = {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests/engines"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if ranks == 2 else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if ranks == 2 else "0",
        **environ,
    }
    options = {"tensor_parallel_size": ranks, "worker_extension_cls": "vllm_extension.Extension"}
    whole = {**job, "llm": {**job["llm"], **options}}
    with tempfile.TemporaryFile("w+", dir=folder) as log:
        engine = Engine(whole, environment, log)
        try:
            yield engine
        finally:
            engine.close()


def _throughput(
    result: Result,
    folder: Path,
    job: Mapping[str, Any],
    ranks: int,
    alternatives: Mapping[str, Mapping[str, str]],
    rounds: int,
) -> None:
    """Rounds of all alternatives in turn; the first two of each only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    tokens: dict[str, set[str]] = {name: set() for name in alternatives}
    with ExitStack() as stack:
        engines = {}
        for name, environ in alternatives.items():
            _say(f"{ranks} rank(s): starting {name}")
            engine = _engine(folder, job, ranks, environ, f"{name}-{ranks}")
            engines[name] = stack.enter_context(engine)
        for index in range(rounds + 2):
            order = list(engines) if index % 2 else list(engines)[::-1]
            for name in order:
                answer = engines[name].round()
                tokens[name].add(answer["tokens"])
                if index >= 2:
                    seconds[name].append(answer["seconds"])
    for name, taken in seconds.items():
        faster = ratios(taken, seconds["fixpass"])
        row = {"what": f"throughput, {ranks} rank{'s' * (ranks > 1)}", "engine": name}
        row |= {"seconds": spread(taken), "fixpass against it": faster if name != "fixpass" else ""}
        result.rows.append(row)
        if (ranks, name) in BOUNDS:
            claim = f"throughput with {ranks} rank(s), fixpass / {name}"
            bound = BOUNDS[ranks, name]
            result.checks.append(Check(claim, faster.median, bound, at_least=True))


def _starts(
    result: Result, folder: Path, job: Mapping[str, Any], ranks: int, state: str, repeats: int
) -> None:
    """Starts in turn, with empty caches or with those of the start before."""
    seconds: dict[str, list[float]] = {"vllm": [], "fixpass": []}
    many = f"{ranks} rank{'s' * (ranks > 1)}"
    for index in range(repeats):
        for name in list(seconds) if index % 2 else list(seconds)[::-1]:
            caches = f"start-{name}-{ranks}-{index if state == 'cold' else 0}"
            _say(f"{many}, {state} start {index + 1}/{repeats}: {name}")
            with _engine(folder, job, ranks, THROUGHPUT[ranks][name], caches) as engine:
                seconds[name].append(engine.seconds)
    slower = ratios(seconds["fixpass"], seconds["vllm"])
    for name, taken in seconds.items():
        row = {"what": f"start, {many}, caches {state}", "engine": name, "seconds": spread(taken)}
        result.rows.append({**row, "fixpass against it": slower if name == "vllm" else ""})
    claim = f"start, {many}, with {state} caches, fixpass / vllm"
    result.checks.append(Check(claim, slower.median, 1.1))


def _say(text: str) -> None:
    print(f"vllm-serving: {text}", file=sys.stderr, flush=True)

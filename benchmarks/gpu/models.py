"""Part models: Llama and Qwen3 (q, k and v packed) of 4096 features under four backends.

A process for each model and backend compiles beside the others and then waits; they are measured
one after another. Prefill of 512 and 2,048 tokens, decode of batches of 1 and 32 behind 512
tokens, with and without CUDA graphs.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Part

MODELS = ("qwen3", "llama")
BACKENDS = ("eager", "inductor", "fixpass", "fixpass, norms by Inductor")
NOT_SLOWER = 1.02
COMPILING = 0.65  # of the part's time


class Child:
    """The process of one model and backend."""

    def __init__(self, model: str, backend: str, part: Part, folder: Path) -> None:
        self.name = f"{model}, {backend}"
        self.json = folder / f"{self.name}.json"
        self.log = (folder / f"{self.name}.log").open("w+b")
        code = "import sys; from benchmarks.gpu.model_child import main; main(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, model, backend, part.device, str(self.json)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2" if part.on_gpu else "1"},
        )  # fmt: skip

    def says(self, word: bytes, seconds: float) -> bool:
        """Whether the child prints this line next, within the seconds."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, seconds))
        return bool(ready) and self.process.stdout.readline().strip() == word

    def measure(self, seconds: float) -> bool:
        assert self.process.stdin is not None
        self.process.stdin.write(b"measure\n")
        self.process.stdin.flush()
        return self.says(b"measured", seconds)

    def end(self, part: Part) -> None:
        """End the process and take its rows over."""
        self.process.kill()
        self.process.communicate()
        if not self.json.exists():
            self.log.seek(0)
            part.fail(self.name, "died", self.log.read().decode(errors="replace"))
            return
        found = json.loads(self.json.read_text())
        for row in found["rows"]:
            part.add(f"{self.name}: {row.pop('what')}", **row)
        for error in found["errors"]:
            part.fail(f"{self.name}: {error['what']}", error["error"], error["trace"])


def run(part: Part) -> None:
    with tempfile.TemporaryDirectory(prefix="fixpass-models-") as folder:
        waiting: list[Child] = []
        for model in MODELS:
            for backend in BACKENDS:
                child = Child(model, backend, part, Path(folder))
                if part.on_gpu:
                    waiting.append(child)
                else:
                    _finish(child, part, part.left())  # two cores: one at a time
        compiled_by = part.elapsed() + part.left() * COMPILING
        for child in waiting:
            _finish(child, part, compiled_by - part.elapsed())
    _compare(part)


def _finish(child: Child, part: Part, seconds: float) -> None:
    if not child.says(b"compiled", seconds):
        part.fail(child.name, "did not compile in time, or died")
    elif not child.measure(part.left() - 2):
        part.fail(child.name, "was not measured in time, or died")
    child.end(part)


def _compare(part: Part) -> None:
    """Hold fixpass to Inductor's times."""
    times: dict[str, float] = {row["what"]: row["ms"] for row in part.rows if "ms" in row}
    for model in MODELS:
        prefix = f"{model}, fixpass: "
        for name, found in times.items():
            other: Any = times.get(name.replace(prefix, f"{model}, inductor: "))
            if name.startswith(prefix) and other is not None:
                part.check(f"{name}: fixpass / Inductor", found / other, NOT_SLOWER)

"""One part of the GPU checks: its rows, bounds and errors, written as JSON after each of them.

    python -m benchmarks.gpu.part MODULE:FUNCTION --device cuda --seconds 60 --json part.json

runs a part in this process. Only `command.py` decides which parts there are.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Check

OK, WRONG, SLOW, FAILED = "ok", "wrong values", "slower than its bound", "failed"
LONG = ("report", "examples", "first_tokens")  # in the JSON only


class Part:
    """Rows of one part. A row's `correct` says whether its values are right."""

    def __init__(self, name: str, device: str, seconds: float, path: Path) -> None:
        self.name, self.device, self.path = name, device, path
        self.on_gpu = device != "cpu"
        self.started, self.seconds = time.monotonic(), seconds
        self.rows: list[dict[str, Any]] = []
        self.checks: list[Check] = []
        self.errors: list[dict[str, str]] = []
        self.finished = False

    def elapsed(self) -> float:
        """Seconds since the part began."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds in which the part may still start work."""
        return self.seconds - self.elapsed()

    def add(self, what: str, **row: Any) -> None:
        """Note a row, show it, and write the JSON."""
        self.rows.append({"what": what, **row})
        shown = {key: _short(value) for key, value in row.items() if key not in LONG}
        cells = "  ".join(f"{key} {value}" for key, value in shown.items())
        print(f"  {self.elapsed():5.0f} s  {what}: {cells}", flush=True)
        self.write()

    def check(self, claim: str, measured: float, bound: float, at_least: bool = False) -> None:
        """Note a bound on a measured number. Times of the CPU are held to no bound."""
        if self.on_gpu:
            self.checks.append(Check(claim, measured, bound, at_least))
            print(f"  {self.elapsed():5.0f} s  {self.checks[-1]}", flush=True)
            self.write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note an error of the block under `what`, and go on after it."""
        try:
            yield
        except Exception as error:
            self.fail(what, f"{type(error).__name__}: {error}", traceback.format_exc())

    def fail(self, what: str, error: str, trace: str = "") -> None:
        """Note an error."""
        self.errors.append({"what": what, "error": error[:2000], "trace": trace[-4000:]})
        print(f"  {self.elapsed():5.0f} s  FAILED {what}: {error[:300]}", flush=True)
        self.write()

    def status(self) -> str:
        if any(not row.get("correct", True) for row in self.rows):
            return WRONG
        if self.errors or not self.finished:
            return FAILED
        return OK if all(check.holds for check in self.checks) else SLOW

    def write(self) -> None:
        data = {
            "part": self.name,
            "device": self.device,
            "status": self.status(),
            "seconds": round(self.elapsed(), 1),
            "rows": self.rows,
            "checks": [{**vars(check), "holds": check.holds} for check in self.checks],
            "errors": self.errors,
        }
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(data, indent=1, default=str) + "\n")
        partial.replace(self.path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64; infinite where a value is no number."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part")
    parser.add_argument("function")
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    module, _, function = arguments.function.partition(":")
    part = Part(arguments.json.stem, arguments.device, arguments.seconds, arguments.json)
    part.write()
    with part.attempt(part.name):
        getattr(import_module(module), function)(part)
    part.finished = True
    part.write()


if __name__ == "__main__":
    main(sys.argv[1:])

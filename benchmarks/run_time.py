"""A forward pass of each real model in eager mode, under Inductor and under fixpass, side by side.

The models are those of the tests: real classes with tiny random configs. One thread, CPU seconds.
The compiled versions are checked against each other before they are timed, and the loops that
Inductor generates are counted: they do not depend on how busy the machine is.
"""

import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._inductor import metrics

from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import calls_for, interleave

ABOUT = (
    "Milliseconds of one forward pass in float32, on one thread, of real model classes with tiny "
    "random configs (two sequences of 128 tokens); and how many loops Inductor generates "
    "without fixpass and with it."
)
BATCH, LENGTH = 2, 128
BOUND = 1.02
QUICK = ("qwen3-packed", "bert")


def run(quick: bool, names: Sequence[str] = ()) -> Result:
    from tests.helpers import models

    names = names or (QUICK if quick else models.NAMES)
    result = Result("run-time", ABOUT, quick=quick)
    for index, name in enumerate(names, 1):
        print(f"run-time: {index}/{len(names)} {name}", file=sys.stderr, flush=True)
        built = models.build(name)
        _measure(result, built, _inputs(built), rounds=5 if quick else 101)
    return result


def _inputs(model: Any) -> dict[str, Any]:
    """Longer inputs than the tests use, so that kernels and not calls are timed."""
    inputs: dict[str, Any] = model.prefill()
    if "input_ids" in inputs:
        generator = torch.Generator().manual_seed(0)
        most = int(model.ids.max())
        inputs["input_ids"] = torch.randint(3, most, (BATCH, LENGTH), generator=generator)
    return {key: False if key == "use_cache" else value for key, value in inputs.items()}


def _measure(result: Result, model: Any, inputs: dict[str, Any], rounds: int) -> None:
    torch._dynamo.reset()
    alternatives: dict[str, Callable[[], Any]] = {"eager": lambda: model.module(**inputs)}
    loops, outputs = {}, {}
    with torch.no_grad():
        for backend in ("inductor", "fixpass"):
            compiled = _compile(model.module, backend)
            metrics.reset()
            outputs[backend] = compiled(**inputs)
            loops[f"loops, {backend}"] = metrics.generated_kernel_count
            alternatives[backend] = lambda run=compiled: run(**inputs)
        torch.testing.assert_close(
            outputs["fixpass"][0], outputs["inductor"][0], rtol=1e-3, atol=1e-4
        )
        samples = interleave(alternatives, rounds, calls_for(alternatives["fixpass"], 0.03))
    row = {key: spread(taken).scaled(1e3) for key, taken in samples.items()}
    parity = ratios(samples["fixpass"], samples["inductor"])
    result.rows.append({"model": model.name, **row, "fixpass / inductor": parity, **loops})
    result.checks.append(Check(f"{model.name}: fixpass / inductor", parity.median, BOUND))


def _compile(module: Any, backend: str) -> Callable[..., Any]:
    """`module` under a backend, in a code object of its own.

    Dynamo keeps what it compiled by code object and looks through all of it at each call: two
    backends on one would make the second look slower.
    """

    def forward(**inputs: Any) -> Any:
        return module(**inputs)

    own = FunctionType(
        forward.__code__.replace(), forward.__globals__, backend, None, forward.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=False)
    return compiled

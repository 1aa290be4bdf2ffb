"""Part kernels: every kernel over layouts, dtypes and sizes, against the ops' references.

The cases are those of the tests' probe, in an order that mixes them, as many as fit
the time. Large offsets, streams and capture follow, which only a device shows.
"""

import os
import random
from collections.abc import Iterable
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.gpu.clock import captured, wait
from benchmarks.gpu.compiled import BF16_ERROR
from benchmarks.gpu.part import Part, relative_error
from fixpass.runtime.kernels.rms_norm import rms_norm
from fixpass.testing.kernel_memory import trace_memory
from fixpass.testing.kernel_memory.on_device import launcher_on
from helpers import kernel_probe

EPS = 1e-6
CPU_CASES = 24
FAR = 2**31


def run(part: Part) -> None:
    if part.on_gpu:
        for check in (_far_rows, _many_elements, _captured_unseen, _other_stream):
            with part.attempt(check.__name__.strip("_").replace("_", " ")):
                check(part)
                torch.cuda.empty_cache()
    with part.attempt("probe"):
        _probe(part)


def _probe(part: Part) -> None:
    cases = list(kernel_probe.cases())
    random.Random(7).shuffle(cases)
    if not part.on_gpu:
        return _judge(
            part, map(_outcome, [(case, "cpu") for case in cases[:CPU_CASES]]), len(cases)
        )
    # Most of a case's time is compilation, on the CPU.
    with get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        given = [(case, part.device) for case in cases]
        _judge(part, pool.imap_unordered(_outcome, given, chunksize=4), len(cases))


def _outcome(given: tuple[kernel_probe.Case, str]) -> tuple[str, str]:
    """A case's name and its fault; no fault is empty."""
    case, device = given
    try:
        outcome = kernel_probe.run(case, launcher_on(device) if device != "cpu" else trace_memory)
    except Exception as error:
        return str(case), f"{type(error).__name__}: {error}"[:500]
    faults = [str(fault) for fault in outcome.report.faults]
    if outcome.excess > 1:
        faults.append(f"{outcome.excess:.0f} steps beyond float32 noise")
    return str(case), "; ".join(faults)


def _judge(part: Part, outcomes: Iterable[tuple[str, str]], of: int) -> None:
    done, wrong = 0, []
    for name, fault in outcomes:
        done += 1
        wrong += [f"{name}: {fault}"] if fault else []
        if done % 250 == 0:
            print(f"  {part.elapsed():5.0f} s  {done} cases", flush=True)
        if part.left() < 2:
            break
    part.add("probe", cases=done, of=of, wrong=len(wrong), correct=not wrong, examples=wrong[:20])


def _exact(x: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def _norm(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms_norm(x, None, EPS, out=out)
    return out


def _add(part: Part, what: str, got: Tensor, x: Tensor) -> None:
    error = relative_error(got, _exact(x))
    part.add(what, error=error, correct=error < BF16_ERROR)


def _far_rows(part: Part) -> None:
    flat = torch.randn(FAR + 72, device=part.device, dtype=torch.bfloat16)
    x = flat.as_strided((2, 64), (FAR + 8, 1))
    _add(part, "rows 2**31 elements apart", _norm(x), x)


def _many_elements(part: Part) -> None:
    many = FAR // 4096
    x = torch.randn(many + 64, 4096, device=part.device, dtype=torch.bfloat16)
    rows = torch.tensor([0, 1, many - 1, many, many + 63], device=part.device)
    _add(part, "more than 2**31 elements", _norm(x)[rows], x[rows])


def _captured_unseen(part: Part) -> None:
    x = torch.randn(10, 224, device=part.device, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    graph = captured([lambda: rms_norm(x, None, EPS, out=out)])
    x.normal_()
    graph.replay()
    _add(part, "a captured launch reads new values", out, x)


def _other_stream(part: Part) -> None:
    x = torch.zeros(4096, 4096, device=part.device, dtype=torch.bfloat16)
    work = torch.randn(4096, 4096, device=part.device)
    _norm(x)
    wait(part.device)
    with torch.cuda.stream(torch.cuda.Stream()):
        # Slow work before x is filled: a kernel on another stream would read zeros.
        for _ in range(20):
            work = work @ work * 1e-3
        x.normal_()
        got = _norm(x)
    wait(part.device)
    _add(part, "on a stream of its own", got, x)

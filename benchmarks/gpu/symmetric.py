"""Part symmetric-memory: two ranks, on one GPU where PyTorch is told to allow it.

Ranks meet in a file, so that no network is needed. On the CPU they use gloo.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fixpass
import fixpass.symmetric_memory
from benchmarks.gpu.part import Part, relative_error
from fixpass.backend import fixpass as backend

RANKS = 2
ERROR = 1e-3
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


def run(part: Part) -> None:
    """Start the ranks and take over their rows."""
    environ = {**os.environ, OVERLAP: "1"}
    with tempfile.TemporaryDirectory(prefix="fixpass-ranks-") as folder:
        code = "import sys; from benchmarks.gpu import symmetric; symmetric.one_rank(*sys.argv[1:])"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(rank), folder, part.device],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        end = time.monotonic() + max(5.0, part.left())
        for rank, process in enumerate(ranks):
            try:
                said, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
                problem = "" if process.returncode == 0 else f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                said, problem = process.communicate()[0], "ended at the part's limit"
            path = Path(folder) / f"rank{rank}.json"
            found = json.loads(path.read_text()) if path.exists() else {"rows": [], "errors": []}
            for row in found["rows"]:
                part.add(f"rank {rank}: {row.pop('what')}", **row)
            for error in found["errors"]:
                part.fail(f"rank {rank}: {error['what']}", error["error"], error["trace"])
            if problem:
                part.fail(f"rank {rank}", problem, said)


def one_rank(rank: str, folder: str, device: str) -> None:
    """All that one rank does."""
    part = Part(f"rank{rank}", device, 60.0, Path(folder) / f"rank{rank}.json")
    if part.on_gpu:
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    with part.attempt("all-reduce"):
        _all_reduce(part)
    with part.attempt("row-parallel model"), torch.no_grad():
        _row_parallel(part)
    part.write()
    sys.stdout.flush()
    # A rank that failed must not keep the other waiting in a goodbye.
    os._exit(0)


def _all_reduce(part: Part) -> None:
    context = fixpass.symmetric_memory.context()
    part.add("decision", symmetric=context.symmetric, reason=context.reason)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (8 << 10, 1 << 18) if part.on_gpu else (1 << 10,):
            x = torch.full((count,), float(dist.get_rank() + 1), device=part.device, dtype=dtype)
            first, second = context.all_reduce(x), context.all_reduce(x)
            correct = bool((first == sum(range(1, RANKS + 1))).all())
            what = f"all-reduce {dtype} of {x.nbytes} bytes"
            part.add(what, same_bits=torch.equal(first, second), correct=correct)


def _row_parallel(part: Part) -> None:
    torch.manual_seed(0)
    hidden = 1024 if part.on_gpu else 32
    model = torch.nn.Sequential(
        torch.nn.Linear(hidden, 2 * hidden, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(2 * hidden, hidden, bias=False),
    ).to(part.device)
    x = torch.randn(8, hidden).to(part.device)
    want = model(x)
    mesh = init_device_mesh(part.device, (RANKS,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    compiled = torch.compile(model, backend=backend, dynamic=False)
    first, second = compiled(x), compiled(x)
    report = "\n".join(map(str, fixpass.last_reports()))
    placed = "symmetric memory" in report
    part.add(
        "row-parallel model", error=relative_error(first, want), report=report,
        same_bits=torch.equal(first, second),
        correct=relative_error(first, want) < ERROR and torch.equal(first, second),
    )  # fmt: skip
    if part.on_gpu:
        copies, resident = _kernels(lambda: compiled(x))
        part.add("profile", placed=placed, copy_kernels=copies, resident=resident,
                 correct=not placed or (copies == 0 and resident))  # fmt: skip


def _kernels(run: Callable[[], object]) -> tuple[int, bool]:
    """Copy kernels of one call, and whether the all-reduce was given symmetric memory."""
    from torch.distributed import _symmetric_memory as symm_mem
    from torch.profiler import ProfilerActivity, profile

    seen: list[bool] = []
    op = torch.ops.symm_mem.one_shot_all_reduce

    def noting(x: Tensor, *rest: object) -> Tensor:
        seen.append(symm_mem.is_symm_mem_tensor(x))
        result: Tensor = op(x, *rest)
        return result

    with (
        patch.object(torch.ops.symm_mem, "one_shot_all_reduce", noting),
        profile(activities=[ProfilerActivity.CUDA]) as profiler,
    ):
        run()
        torch.cuda.synchronize()
    names = [event.name.lower() for event in profiler.events()]
    return sum("copy" in each or "memcpy dtod" in each for each in names), bool(seen) and all(seen)

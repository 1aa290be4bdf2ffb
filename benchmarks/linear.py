"""Linear layers of few rows on CPU: torch, oneDNN, llama.cpp, skinny_linear, a plain read.

Each call reads another copy of the weight, so that none comes out of a cache. The clock is wall
time, because threads wait for memory together; all ways run in each round.
"""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import ggml
from benchmarks.results import Check, Result, Spread, ratios, spread
from benchmarks.timing import interleave
from fixpass.runtime import linear

ABOUT = (
    "x (rows, K) by a weight (N, K), or (K, N) where marked, on {threads} threads. oneDNN reads a "
    "copy that it packed; the others read the plain weight. Read: one pass over the same bytes. "
    "llama.cpp: its library ggml, where the package llama-cpp-python is installed."
)
MANY_ROWS = " A compiled call of 17 rows takes {more} us more with fixpass than with Inductor."
MOST_MICROSECONDS = 0.3
# N, K, whether the weight is (K, N): Qwen3's and Llama's layers, a head, odd sizes, Conv1D.
SHAPES = (
    (4096, 4096, False),
    (3072, 1024, False),
    (1024, 3072, False),
    (8192, 1024, False),
    (1025, 999, False),
    (3072, 1024, True),
)
ROWS = (1, 2, 4, 8, 16)
BYTES = 96 << 20
"""Bytes of all copies of a weight: more than the caches hold."""


def run(quick: bool) -> Result:
    result = Result("linear", "", quick=quick)
    assert linear.unavailable() == ""
    for threads in (1,) if quick else (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for n, k, transposed in SHAPES[1:2] if quick else SHAPES:
                for rows in ROWS:
                    _add(result, (rows, n, k, transposed), dtype, threads)
    torch.set_num_threads(1)
    more = _many_rows(5 if quick else 61)
    result.about = ABOUT.format(threads="1 and 2" if not quick else "1")
    result.about += MANY_ROWS.format(more=more)
    claim = "17 rows: us of a compiled layer over Inductor's"
    result.checks.append(Check(claim, more.median, MOST_MICROSECONDS))
    return result


@torch.no_grad()
def _many_rows(rounds: int) -> Spread:
    """Microseconds that a small layer takes more, where PyTorch computes it in both ways."""
    layers = 10
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    ways: dict[str, Callable[[], object]] = {}
    x = torch.randn(linear.MOST_ROWS + 1, 16)
    for backend in ("inductor", "fixpass"):
        compiled = torch.compile(copy.deepcopy(model), backend=backend, dynamic=True)
        compiled(x)
        # Behind these, the number of rows is a symbol.
        compiled(torch.randn(2, 16))
        ways[backend] = lambda run=compiled: run(x)
    samples = interleave(ways, rounds, calls=300)
    pairs = zip(samples["fixpass"], samples["inductor"], strict=True)
    return spread([(ours - theirs) / layers * 1e6 for ours, theirs in pairs])


@torch.no_grad()
def _add(
    result: Result, shape: tuple[int, int, int, bool], dtype: torch.dtype, threads: int
) -> None:
    rows, n, k, transposed = shape
    torch.manual_seed(0)
    count = max(1, BYTES // (n * k * dtype.itemsize))
    weights = [torch.randn(k, n).to(dtype) if transposed else None for _ in range(count)]
    plain = [torch.randn(n, k).to(dtype) if w is None else w.t() for w in weights]
    x = torch.randn(rows, k).to(dtype)
    samples = interleave(_ways(x, plain), 3 if result.quick else 15, clock=time.perf_counter)
    case = {
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "weight": f"({k}, {n})" if transposed else f"{n} x {k}",
        "rows": rows,
    }
    for way, taken in samples.items():
        result.rows.append(
            {
                **case,
                "way": way,
                "ms": spread([seconds / count * 1e3 for seconds in taken]),
                "time / skinny_linear": ratios(taken, samples["skinny_linear"]),
            }
        )
    if rows == 1 and not transposed and dtype is not torch.float16:
        speed = ratios(samples["read"], samples["skinny_linear"]).median
        name = f"{threads} threads, {case['dtype']}, {case['weight']}: speed / a read's"
        result.checks.append(Check(name, speed, 0.85, at_least=True))


def _ways(x: Tensor, weights: list[Tensor]) -> dict[str, Callable[[], object]]:
    skinny = torch.ops.fixpass.skinny_linear.default
    views = [weight.t() for weight in weights]
    # Sums of 64-bit integers: a vectorised pass that computes next to nothing.
    words = [_words(weight) for weight in weights]
    found: dict[str, Callable[[], object]] = {
        "F.linear": lambda: [F.linear(x, weight) for weight in weights],
        "skinny_linear": lambda: [skinny(x, view, None) for view in views],
        "read": lambda: [torch.sum(word) for word in words],
    }
    if x.dtype is not torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pack = torch.ops.mkldnn._reorder_linear_weight
        packed = [pack(weight.contiguous()) for weight in weights]
        layer = torch.ops.mkldnn._linear_pointwise.default
        found["oneDNN packed"] = lambda: [layer(x, w, None, "none", [], "") for w in packed]
    if weights[0].is_contiguous():
        by_ggml = ggml.linears(x, weights, torch.get_num_threads())
        found |= {"llama.cpp": by_ggml} if by_ggml is not None else {}
    return found


def _words(weight: Tensor) -> Tensor:
    """The bytes of a weight, as far as they are whole words."""
    flat = weight.contiguous() if weight.is_contiguous() else weight.t()
    flat = flat.reshape(-1)
    return flat[: flat.numel() // 8 * 8].view(torch.int64)

"""All-reduce of two ranks on one host against gloo's, and against one local add of the buffers.

The ranks are two processes with one thread each. Then 4 and 8 ranks, which share the cores: an
all-reduce against the same additions made by one rank after the other.
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.all_reduce_ranks import (
    KIB,
    MIB,
    all_reduces,
    all_reduces_in_turn,
    has_avx512,
)
from benchmarks.results import Check, Result, Spread, ratios, spread

ABOUT = (
    "Microseconds of an all-reduce of two ranks on this host (one thread each), the slower rank's, "
    "side by side in one run. `local add` adds two buffers of the size, on both ranks at once: no "
    "all-reduce can be faster. All sum in place. "
    "{vllm}"
)
SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, *(MIB << shift for shift in range(0, 7, 2))]
DTYPES = ("float32", "bfloat16")
# (up to so many bytes, how many times as fast as gloo)
BOUNDS = ((64 * KIB, 20.0), (256 * KIB, 8.0), (64 * MIB, 2.0))
ADD_BOUND, TURN_BOUND, VLLM_BOUND = 2.0, 3.0, 1.0


def run(quick: bool) -> Result:
    from tests.helpers.ranks import Ranks

    result = Result("all-reduce", ABOUT.format(vllm=_about_vllm()), quick=quick)
    sizes = SIZES[1:5:2] if quick else SIZES
    with Ranks(2, seconds=1200) as ranks:
        for dtype, num_bytes in product(DTYPES, sizes):
            rounds = 3 if quick else 41 if num_bytes < 4 * MIB else 15
            samples = ranks.run(all_reduces, dtype, num_bytes, rounds)[0]
            _add_pair(result, dtype, num_bytes, samples)
    for size, num_bytes in product((4, 8), (64 * KIB, MIB, 4 * MIB)):
        with Ranks(size, seconds=1200) as ranks:
            samples = ranks.run(all_reduces_in_turn, num_bytes, 3 if quick else 15)[0]
        _add_crowd(result, size, num_bytes, samples)
    result.figure = lambda folder: plot(result, folder)
    return result


def _add_pair(result: Result, dtype: str, num_bytes: int, samples: dict[str, list[float]]) -> None:
    against_gloo = ratios(samples["gloo"], samples["fixpass"])
    against_add = ratios(samples["fixpass"], samples["local add"])
    against_vllm = ratios(samples["vllm"], samples["fixpass"]) if "vllm" in samples else ""
    row = _row(2, dtype, num_bytes, samples)
    row |= {"gloo / fixpass": against_gloo, "fixpass / limit": against_add}
    row["vllm / fixpass"] = against_vllm
    result.rows.append(row)
    what = f"{dtype}, {_size(num_bytes)}"
    bound = next(bound for most, bound in BOUNDS if num_bytes <= most)
    result.checks.append(
        Check(f"{what}: gloo / fixpass", against_gloo.median, bound, at_least=True)
    )
    if isinstance(against_vllm, Spread):
        claim = f"{what}: vllm / fixpass"
        result.checks.append(Check(claim, against_vllm.median, VLLM_BOUND, at_least=True))
    if num_bytes >= MIB:
        result.checks.append(Check(f"{what}: fixpass / local add", against_add.median, ADD_BOUND))


def _add_crowd(result: Result, size: int, num_bytes: int, samples: dict[str, list[float]]) -> None:
    over = ratios(samples["fixpass"], samples["in turn"])
    result.rows.append(
        _row(size, "float32", num_bytes, samples)
        | {"gloo / fixpass": "", "fixpass / limit": over, "vllm / fixpass": ""}
    )
    claim = f"{size} ranks, {_size(num_bytes)}: fixpass / the same work in turn"
    result.checks.append(Check(claim, over.median, TURN_BOUND))


def _row(size: int, dtype: str, num_bytes: int, samples: dict[str, list[float]]) -> dict[str, Any]:
    names = ("fixpass", "gloo", "vllm", "local add", "in turn")
    cells = {f"{name}, us": _micros(samples[name]) if name in samples else "" for name in names}
    return {"ranks": size, "dtype": dtype, "size": _size(num_bytes), **cells}


def _micros(samples: list[float]) -> Spread:
    return spread(samples).scaled(1e6)


def _size(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // KIB} KiB"


def _about_vllm() -> str:
    if not has_avx512():
        return "vLLM's all-reduce over shared memory needs AVX-512, which this machine has not."
    if find_spec("vllm") is None:
        return "vLLM, whose all-reduce over shared memory could run here, is not installed."
    return "`vllm` is its all-reduce over shared memory, which needs AVX-512."


def plot(result: Result, folder: Path) -> None:
    """The two-rank rows over the size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(DTYPES), figsize=(9, 3.6), sharey=True)
    for axis, dtype in zip(axes, DTYPES, strict=True):
        rows = [row for row in result.rows if row["ranks"] == 2 and row["dtype"] == dtype]
        for name in ("gloo", "vllm", "fixpass", "local add"):
            cells = [row[f"{name}, us"] for row in rows if row[f"{name}, us"]]
            if not cells:
                continue
            axis.plot([row["size"] for row in rows], [c.median for c in cells], "o-", label=name)
            low, high = [c.low for c in cells], [c.high for c in cells]
            axis.fill_between(range(len(rows)), low, high, alpha=0.2)
        axis.set(title=f"{dtype}, 2 ranks", yscale="log", ylabel="microseconds a call")
        axis.tick_params(axis="x", rotation=45)
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / f"{result.name}.svg", metadata={"Date": None})
    pyplot.close(figure)

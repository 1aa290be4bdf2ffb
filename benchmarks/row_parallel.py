"""Row-parallel blocks of Llama on two ranks: compiled with fixpass, and with Inductor and gloo.

The blocks are transformers' own under `parallelize_module`, the same as in the tests. Both are
compiled before any clock runs, and called in turn.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from benchmarks.all_reduce_ranks import Samples, in_turn
from benchmarks.results import Check, Result, ratios, spread

ABOUT = (
    "Microseconds of one call of a row-parallel block of Llama on two ranks (float32, one thread "
    "each, the slower rank's), compiled with fixpass, and with Inductor, whose all-reduce is "
    "gloo's. Decode is one token, prefill is 512. With larger blocks the matmuls hide what an "
    "all-reduce costs: a decode reads all weights once."
)
DECODE, PREFILL = 1, 512
DECODE_BOUND, PREFILL_BOUND = 1.5, 1.0
HIDDEN_SIZES = (256, 512, 1024, 2048)


def run(quick: bool) -> Result:
    from tests.helpers.ranks import Ranks

    result = Result("row-parallel", ABOUT, quick=quick)
    sizes = HIDDEN_SIZES[:1] if quick else HIDDEN_SIZES
    with Ranks(2, seconds=1200) as ranks:
        for part, hidden_size in product(("mlp", "attention"), sizes):
            for count in (DECODE, PREFILL):
                rounds = 5 if quick else 21
                samples = ranks.run(block, part, hidden_size, count, rounds)[0]
                _add(result, part, hidden_size, count, samples)
    return result


def _add(result: Result, part: str, hidden_size: int, count: int, samples: Samples) -> None:
    faster = ratios(samples["inductor"], samples["fixpass"])
    row: dict[str, Any] = {"block": part, "hidden size": hidden_size, "tokens": count}
    row |= {f"{name}, us": spread(taken).scaled(1e6) for name, taken in samples.items()}
    result.rows.append(row | {"inductor / fixpass": faster})
    bound = DECODE_BOUND if count == DECODE else PREFILL_BOUND
    claim = f"{part}, hidden size {hidden_size}, {count} tokens: inductor / fixpass"
    result.checks.append(Check(claim, faster.median, bound, at_least=True))


def block(part: str, hidden_size: int, count: int, rounds: int) -> Samples:
    """What each rank does: seconds a call by backend, after the two agree."""
    from tests.helpers.row_parallel import build, tokens

    torch._dynamo.reset()
    x = tokens(hidden_size, count)
    ways: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for backend in ("fixpass", "inductor"):
            run = torch.compile(build(part, hidden_size), backend=backend)
            ways[backend] = lambda run=run: run(x)
        torch.testing.assert_close(ways["fixpass"](), ways["inductor"]())
        return in_turn(ways, rounds)

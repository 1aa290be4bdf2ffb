"""One compilation in a fresh process: `python -m benchmarks.compile_once BACKEND LAYERS`.

Prints one JSON object: wall and CPU seconds from `torch.compile` to the first result, compilers
that were started included, and what the caches say. Imports and making the model do not count.
"""

import json
import resource
import sys
import time

import torch
from torch._dynamo.utils import counters

from examples.packed_qkv import build
from fixpass.passes.pipeline import source_hash

COUNTERS = (
    ("inductor", "fxgraph_cache_hit"),
    ("inductor", "fxgraph_cache_miss"),
    ("inductor", "fxgraph_cache_bypass"),
    ("aot_autograd", "autograd_cache_hit"),
    ("aot_autograd", "autograd_cache_miss"),
    ("aot_autograd", "autograd_cache_bypass"),
)


def main(backend: str, num_layers: str) -> None:
    model, (tokens,) = build(int(num_layers))
    model = model.float()
    cpu, wall = _cpu_seconds(), time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=tokens, use_cache=False)
    print(
        json.dumps(
            {
                "wall": time.perf_counter() - wall,
                "cpu": _cpu_seconds() - cpu,
                "sources": source_hash(),
                "counters": {name: counters[group][name] for group, name in COUNTERS},
            }
        )
    )


def _cpu_seconds() -> float:
    """Seconds of this process and of the compilers that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(*sys.argv[1:])

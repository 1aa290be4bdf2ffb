"""A small Qwen3 with packed QKV: explained for two devices, compiled, checked, timed on this CPU.

python examples/demo.py [NUMBER OF LAYERS]
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from packed_qkv import build
from torch import Tensor

import fixpass

NEW_TOKENS, REPEATS, TOLERANCE = 16, 30, 1e-4


@torch.no_grad()
def main(num_layers: int = 4) -> int:
    model, (tokens,) = build(num_layers)
    print("On rocm:gfx942, in bfloat16 (traced here, run nowhere):")
    print(fixpass.explain(model, tokens, target="rocm:gfx942"))
    model = model.float()
    print("On this machine, in float32:")
    print(fixpass.explain(model, tokens), flush=True)

    runs: dict[str, Callable[..., Any]] = {"eager": model}
    for backend in ("inductor", "fixpass"):
        runs[backend] = torch.compile(model, backend=backend, dynamic=True)
        start = time.perf_counter()
        runs[backend](tokens)
        print(f"compiled with {backend} in {time.perf_counter() - start:.0f} s", flush=True)
    error = float((runs["fixpass"](tokens).logits - model(tokens).logits).abs().max())
    print(f"largest difference between the logits and eager's: {error:.1e} (allowed {TOLERANCE})")
    same = torch.equal(generate(runs["fixpass"], tokens), generate(model, tokens))
    print(f"{NEW_TOKENS} greedy tokens {'are' if same else 'ARE NOT'} those of eager")

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):  # in turn, so that noise falls on all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run(tokens)
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, samples in times.items():
        print(f"{name:<8} {median(samples):7.2f} ms for {tokens.numel()} tokens, median")
    return int(error > TOLERANCE or not same)


def generate(run: Callable[..., Any], tokens: Tensor) -> Tensor:
    for _ in range(NEW_TOKENS):
        tokens = torch.cat([tokens, run(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

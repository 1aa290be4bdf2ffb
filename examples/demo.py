"""A Qwen3 with packed QKV: explained for two devices, compiled, checked, timed on this CPU.

The last table shows the tokens a second of `generate`, one sequence at a time.

python examples/demo.py [NUMBER OF LAYERS]
"""

import copy
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from packed_qkv import build
from torch import Tensor, nn

import fixpass
from fixpass.integrations import transformers

WIDTH, PROMPT, NEW_TOKENS, REPEATS, TOLERANCE = 1024, 4, 16, 15, 1e-4


@torch.no_grad()
def main(num_layers: int = 4) -> int:
    model, (tokens,) = build(num_layers, WIDTH)
    print("On rocm:gfx942, in bfloat16 (traced here, run nowhere):")
    print(fixpass.explain(model, tokens, target="rocm:gfx942"))
    model = model.float()
    print("On this machine, in float32:")
    print(fixpass.explain(model, tokens), flush=True)

    runs = {name: decoder(each, tokens[:, :PROMPT]) for name, each in compiled(model).items()}
    results = {}
    for name, run in runs.items():
        start = time.perf_counter()
        results[name] = run()
        print(f"{name}: the first call took {time.perf_counter() - start:.0f} s", flush=True)
    ours, eager = results["fixpass"], results["eager"]
    error = float((torch.stack(ours.logits) - torch.stack(eager.logits)).abs().max())
    print(f"largest difference between the logits and eager's: {error:.1e} (allowed {TOLERANCE})")
    same = torch.equal(ours.sequences, eager.sequences)
    print(f"{NEW_TOKENS} greedy tokens {'are' if same else 'ARE NOT'} those of eager")

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):  # in turn, so that noise falls on all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    for name, samples in times.items():
        print(f"{name:<22} {NEW_TOKENS / median(samples):6.0f} tokens/s, median")
    return int(error > TOLERANCE or not same)


def compiled(model: nn.Module) -> dict[str, nn.Module]:
    """The model in four ways. All read the same parameters; freezing keeps a copy of its own."""
    ways = ("eager", "Inductor", "Inductor with freezing", "fixpass")
    shared = {id(parameter): parameter for parameter in model.parameters()}
    models: dict[str, Any] = {name: copy.deepcopy(model, dict(shared)) for name in ways}
    models["Inductor"].compile()
    models["Inductor with freezing"].compile(options={"freezing": True})
    transformers.compile(models["fixpass"])
    return models


def decoder(model: Any, prompt: Tensor) -> Callable[[], Any]:
    """A call of `generate` that gives the tokens and their logits."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, cache_implementation="static", **options
    )


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""A Qwen3 with packed QKV: explained, compiled in four ways, checked, timed on this CPU."""

import copy
import sys
from functools import partial
from statistics import median
from timeit import timeit
from typing import Any

import torch
from packed_qkv import build
from torch import Tensor, nn

import fixpass
from fixpass.integrations import transformers

WAYS = ("eager", "Inductor", "Inductor with freezing", "fixpass")
WIDTH, PROMPT, NEW_TOKENS, REPEATS, TOLERANCE = 1024, 4, 16, 15, 1e-4


@torch.no_grad()
def main(num_layers: int = 4) -> int:
    model, (tokens,) = build(num_layers, WIDTH)
    print(fixpass.explain(model, tokens, target="rocm:gfx942"))  # traced here, run nowhere
    models, prompt = compiled(model.float()), tokens[:, :PROMPT]
    eager, *_, ours = [generate(models[name], prompt) for name in WAYS]
    error = float((torch.stack(ours.logits) - torch.stack(eager.logits)).abs().max())
    print(f"largest difference between the logits and eager's: {error:.1e} (allowed {TOLERANCE})")
    same = torch.equal(ours.sequences, eager.sequences)
    print(NEW_TOKENS, "greedy tokens", "are" if same else "ARE NOT", "those of eager")
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for name in WAYS * REPEATS:  # in turn, so that noise falls on all of them
        times[name].append(timeit(partial(generate, models[name], prompt), number=1))
    for name, samples in times.items():
        print(f"{name:<22} {NEW_TOKENS / median(samples):6.0f} tokens/s, median")
    return int(error > TOLERANCE or not same)


def compiled(model: nn.Module) -> dict[str, Any]:
    """The model in four ways. All read the same parameters; freezing keeps a copy of its own."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    models: dict[str, Any] = {name: copy.deepcopy(model, dict(shared)) for name in WAYS}
    models["Inductor"].compile()
    models["Inductor with freezing"].compile(options={"freezing": True})
    transformers.compile(models["fixpass"])
    return models


def generate(model: Any, prompt: Tensor) -> Any:
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones_like(prompt), "cache_implementation": "static"}
    return model.generate(prompt, **options)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

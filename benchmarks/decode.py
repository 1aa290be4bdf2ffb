"""Tokens a second of `generate` on CPU: eager, Inductor, Inductor with freezing, fixpass.

All four run one model's weights (freezing keeps its own copy) in turn, so that what slows one down
slows the others too. The clock is wall time: threads of a decode step wait for memory together.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import interleave
from fixpass.integrations import transformers as integration

ABOUT = (
    "Random models of 1024 wide, `generate` with a static cache, greedy, on {threads} threads. "
    "Batch: sequences decoded together. Prefill: one forward of 512 tokens. Tokens a second are "
    "those of all sequences."
)
SIZES = {"vocab_size": 8192, "hidden_size": 1024, "max_position_embeddings": 1024}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", HEADS | {"intermediate_size": 3072}),
    "Llama": ("Llama", HEADS | {"intermediate_size": 3072}),
    "Qwen3-MoE": ("Qwen3Moe", HEADS | EXPERTS | {"intermediate_size": 3072}),
    "GPT-NeoX": ("GPTNeoX", {"num_attention_heads": 16, "intermediate_size": 4096}),
}
PROMPT, PREFILL = 4, 512
# Sequences -> the most that fixpass / Inductor may take, in float32 and in bfloat16.
BOUNDS = {1: (0.55, 0.70), 4: (0.75, 0.90), 16: (1.0, 1.0)}
FREEZING_BOUND, PREFILL_BOUND = 0.75, 1.02


def run(quick: bool) -> Result:
    result = Result("decode", ABOUT.format(threads=torch.get_num_threads()), quick=quick)
    for name in ("Qwen3",) if quick else MODELS:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            batches = (1,) if quick or name != "Qwen3" else tuple(BOUNDS)
            _add(result, name, dtype, batches, layers=2 if quick or name != "Qwen3" else 6)
    return result


def build(name: str, layers: int, dtype: torch.dtype) -> nn.Module:
    """A random model of `MODELS`."""
    import transformers

    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes, num_hidden_layers=layers)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.eval().to(dtype)


def ways(model: nn.Module) -> dict[str, Any]:
    """The model compiled in each way; all share its parameters."""

    def again() -> Any:
        return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})

    found = {"eager": model, "Inductor": again(), "freezing": again(), "fixpass": again()}
    found["Inductor"].compile()
    found["freezing"].compile(options={"freezing": True})
    integration.compile(found["fixpass"])
    return found


@torch.no_grad()
def _add(
    result: Result, name: str, dtype: torch.dtype, batches: tuple[int, ...], layers: int
) -> None:
    torch._dynamo.reset()
    models = ways(build(name, layers, dtype))
    rounds, new = (3, 8) if result.quick else (9, 32)
    for batch in batches:
        prompt = torch.randint(0, SIZES["vocab_size"], (batch, PROMPT))
        runs = {way: _generate(model, prompt, new) for way, model in models.items()}
        samples = interleave(runs, rounds, clock=time.perf_counter)
        _report(result, f"{name}, batch {batch}", dtype, samples, batch * new)
        bound = BOUNDS[batch][dtype is torch.bfloat16]
        _bound(result, f"{name}, {dtype}, batch {batch}", samples, "Inductor", bound)
        if batch == 1:
            _bound(result, f"{name}, {dtype}, batch 1", samples, "freezing", FREEZING_BOUND)
    tokens = torch.randint(0, SIZES["vocab_size"], (1, PREFILL))
    forwards = {way: _prefill(model, tokens) for way, model in models.items()}
    samples = interleave(forwards, rounds, clock=time.perf_counter)
    _report(result, f"{name}, prefill", dtype, samples, PREFILL)
    _bound(result, f"{name}, {dtype}, prefill", samples, "Inductor", PREFILL_BOUND)


def _generate(model: Any, prompt: Tensor, new: int) -> Callable[[], object]:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, cache_implementation="static", pad_token_id=0, **options
    )


def _prefill(model: Any, tokens: Tensor) -> Callable[[], object]:
    return lambda: model(tokens, use_cache=False, logits_to_keep=1)


def _report(
    result: Result, case: str, dtype: torch.dtype, samples: dict[str, list[float]], tokens: int
) -> None:
    for way, taken in samples.items():
        result.rows.append(
            {
                "case": case,
                "dtype": str(dtype).removeprefix("torch."),
                "way": way,
                "tokens/s": spread([tokens / seconds for seconds in taken]),
                "time / Inductor": ratios(taken, samples["Inductor"]),
            }
        )


def _bound(
    result: Result, case: str, samples: dict[str, list[float]], other: str, bound: float
) -> None:
    measured = ratios(samples["fixpass"], samples[other]).median
    result.checks.append(Check(f"{case}: fixpass / {other}", measured, bound))

"""`python -m fixpass demo`: a Qwen3 with packed QKV, compiled, explained, checked and timed.

Everything runs on the CPU. The report for ROCm is what the passes would do there: the graph is
traced with fake tensors that claim the device, and nothing is run on it.
"""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fixpass.explanation import explain
from fixpass.packed import pack_qkv

VOCABULARY, SEQUENCE, NEW_TOKENS, REPEATS = 512, 128, 16, 30
TOLERANCE = 1e-4


def build_model(num_layers: int = 4) -> tuple[nn.Module, Tensor]:
    """A float32 Qwen3ForCausalLM with a small random config, and tokens (1, SEQUENCE) for it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    model = Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        # Norm weights of one would hide a weight that is applied twice or not at all.
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model, torch.randint(0, VOCABULARY, (1, SEQUENCE))


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The packed model in bfloat16 and its arguments, for `python -m fixpass explain`."""
    model, tokens = build_model()
    return pack_qkv(model).to(torch.bfloat16), (tokens,)


@torch.no_grad()
def main() -> int:
    """Run the demo; 0 when every check held."""
    original, tokens = build_model()
    model = pack_qkv(copy.deepcopy(original))
    wanted = original(tokens).logits
    packed_error = error(model(tokens).logits, wanted)
    say(f"Qwen3, 4 layers, packed QKV: logits differ from the original's by {packed_error:.1e}\n")
    say("What fixpass does on this CPU:\n" + str(explain(model, tokens)))
    half, half_tokens = build()
    on_rocm = explain(half, *half_tokens, target="rocm:gfx942")
    say("What it would do on rocm:gfx942, in bfloat16:\n" + str(on_rocm))

    runs: dict[str, Callable[..., Any]] = {"eager": model}
    for backend in ("inductor", "fixpass"):
        runs[backend] = torch.compile(model, backend=backend, dynamic=True)
        with progress(f"compiling with {backend}"):
            runs[backend](tokens)
    logits_error = error(runs["fixpass"](tokens).logits, wanted)
    same_tokens = torch.equal(greedy(runs["fixpass"], tokens), greedy(original, tokens))
    say(f"\nlogits differ from eager's by {logits_error:.1e} (allowed {TOLERANCE:.0e})")
    say(f"{NEW_TOKENS} greedy tokens {'equal' if same_tokens else 'DIFFER FROM'} eager's\n")
    say(timing_table(runs, tokens))
    return int(max(packed_error, logits_error) > TOLERANCE or not same_tokens)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference."""
    return float((got - wanted).abs().max())


def greedy(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """`tokens` and NEW_TOKENS more, each the most likely next one."""
    for _ in range(NEW_TOKENS):
        following = model(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def timing_table(runs: dict[str, Callable[..., Any]], tokens: Tensor) -> str:
    """Milliseconds of a forward, the runs taken in turn so that noise falls on all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(tokens)
            samples[name].append(1e3 * (time.perf_counter() - start))
    lines = [f"forward of {SEQUENCE} tokens, median of {REPEATS} (fastest to slowest)"]
    for name, values in samples.items():
        lines.append(
            f"    {name:<9}{median(values):7.2f} ms  ({min(values):.2f} to {max(values):.2f})"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A line that counts the seconds while the body runs; on a terminal it counts in place."""
    start, done = time.perf_counter(), threading.Event()

    def count() -> None:
        while not done.wait(1.0):
            if sys.stdout.isatty():
                print(f"\r{what} ... {time.perf_counter() - start:.0f} s", end="", flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        prefix = "\r" if sys.stdout.isatty() else ""
        say(f"{prefix}{what} ... {time.perf_counter() - start:.0f} s")

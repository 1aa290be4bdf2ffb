"""One model under one backend: compile every call, print `compiled`, wait for a line, measure.

Weights are random, drawn on the device from one seed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import wait, wall_seconds
from benchmarks.gpu.part import Part
from examples.packed_qkv import pack_qkv
from fixpass.backend import fixpass as backend

STEPS = 32
FLOAT32_ERROR = 1e-4
LARGE = {
    "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def build(model: str, sizes: dict[str, int], device: str, dtype: torch.dtype) -> nn.Module:
    """A causal language model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    make_config, make = kinds[model]
    config = make_config(**sizes, max_position_embeddings=4096)
    with torch.device(device):
        found: nn.Module = make(config).eval()
    generator = torch.Generator(device=device).manual_seed(1)
    with torch.no_grad():
        for name, param in found.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5, generator=generator)
            else:
                param.normal_(0.0, 0.04, generator=generator)
    if model == "qwen3":
        pack_qkv(found)  # as serving engines run it: q and k are slices of one tensor
    return found.to(dtype).requires_grad_(False)


def compiled(
    function: Callable[..., Any], name: str, under: str, graphs: bool = False
) -> Callable[..., Any]:
    """`function` under one of the backends of `models.BACKENDS`."""
    inductor = {"triton.cudagraphs": True} if graphs else {}
    # A code object of its own: Dynamo's limit of compilations counts by code objects.
    own = FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, name,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    if under == "eager":
        return own
    if under == "inductor":
        return torch.compile(own, dynamic=False, options=inductor or None)
    options: dict[str, Any] = {"inductor": inductor} if inductor else {}
    if under != "fixpass":
        options["norm_kernels"] = ("inductor",)
    return torch.compile(own, backend=backend, dynamic=False, options=options)


class Calls:
    """The calls that are measured: `all` by name, with the calls of one sample."""

    def __init__(self, model: str, under: str, part: Part) -> None:
        self.under, self.device = under, part.device
        sizes = LARGE if part.on_gpu else SMALL
        self.model = build(model, sizes, part.device, torch.bfloat16)
        self.vocabulary = sizes["vocab_size"]
        self.all: dict[str, tuple[Callable[[], Tensor], int]] = {}
        self.context = 512 if part.on_gpu else 8
        self.steps = STEPS if part.on_gpu else 2
        for length in (512, 2048) if part.on_gpu else (8,):
            self.all[f"prefill {length}"] = self._prefill(length), 1
        with_graphs = (False, True) if part.on_gpu and under != "eager" else (False,)
        for batch in (1, 32) if part.on_gpu else (1,):
            for graphs in with_graphs:
                name = f"decode {batch}" + (", CUDA graphs" if graphs else "")
                self.all[name] = self._decode(batch, graphs), self.steps

    def tokens(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(0, self.vocabulary, shape, generator=generator).to(self.device)

    def _prefill(self, length: int) -> Callable[[], Tensor]:
        ids, model = self.tokens(1, length), self.model

        def prefill(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits.argmax(-1)

        run = compiled(prefill, f"prefill_{length}", self.under)
        return lambda: run(ids)

    def _decode(self, batch: int, graphs: bool) -> Callable[[], Tensor]:
        from transformers import StaticCache

        model, prompt, first = self.model, self.tokens(batch, self.context), self.tokens(batch, 1)
        length = self.context + self.steps
        cache = StaticCache(config=model.config, max_cache_len=length)
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def decode(ids: Tensor) -> Tensor:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        run = compiled(decode, f"decode_{batch}_{int(graphs)}", self.under, graphs)

        def steps() -> Tensor:
            for layer in cache.layers:
                layer.cumulative_length.fill_(self.context)
            ids, found = first, []
            for _ in range(self.steps):
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                ids = run(ids).clone()
                found.append(ids)
            return torch.cat(found, 1)

        return steps


def check_float32(model: str, under: str, part: Part) -> None:
    """Logits within 1e-4 of eager's, and the same greedy tokens."""
    small = build(model, SMALL, part.device, torch.float32)

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = small(input_ids=ids, use_cache=False).logits
        return logits

    run = compiled(forward, "float32", under)
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, SMALL["vocab_size"], (4, 12), generator=generator).to(part.device)
    got, want = run(ids), forward(ids)
    error = float((got - want).abs().max())
    same = bool(torch.equal(got.argmax(-1), want.argmax(-1)))
    correct = error < FLOAT32_ERROR and same
    part.add("small, float32", error=error, same_tokens=same, correct=correct)


def main(model: str, under: str, device: str, path: str) -> None:
    part = Part(Path(path).stem, device, 600.0, Path(path))
    talk = sys.stdout
    sys.stdout = sys.stderr  # stdout is for the parent
    with torch.no_grad():
        with part.attempt("small, float32"):
            check_float32(model, under, part)
        calls = Calls(model, under, part)
        torch._dynamo.utils.counters.clear()
        for what, (call, _) in calls.all.items():
            with part.attempt(f"compile {what}"):
                for _ in range(3):
                    call()
                wait(device)
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        part.add("compiled", seconds=part.elapsed(), cudagraph_skips=skips)
        print("compiled", file=talk, flush=True)
        sys.stdin.readline()
        for what, (call, count) in calls.all.items():
            with part.attempt(what):
                ms = wall_seconds(call, device) / count * 1e3
                part.add(what, ms=ms, first_tokens=call()[0, :8].tolist())
    part.write()
    print("measured", file=talk, flush=True)
    sys.stdin.readline()

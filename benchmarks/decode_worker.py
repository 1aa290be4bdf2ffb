"""A process that holds one model, compiled in one way, and runs what the benchmark asks it for.

Each way has a process of its own, so that the peak memory of compiling and running is its own.
"""

import resource
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from fixpass.integrations import transformers as integration

HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
FAMILIES = {
    "Qwen3": ("Qwen3", HEADS),
    "Llama": ("Llama", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", HEADS | {"num_experts": 8, "num_experts_per_tok": 2}),
    "GPT-NeoX": ("GPTNeoX", {"num_attention_heads": 16}),
}
VOCABULARY, PROMPT, PREFILL = 8192, 4, 512
WAYS = ("eager", "Inductor", "freezing", "fixpass")


@dataclass(frozen=True)
class Case:
    """A model of random weights, and the number of threads that run it."""

    name: str
    width: int
    dtype: str
    threads: int
    layers: int = 6

    def build(self) -> nn.Module:
        import transformers

        family, heads = FAMILIES[self.name]
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 1024,
        }
        if self.name == "Qwen3-MoE":
            sizes["moe_intermediate_size"] = self.width // 2
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes, **heads)
        # Made in its type: no other copy of the weights adds to the peak of memory.
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        finally:
            torch.set_default_dtype(before)
        return model.eval()


@dataclass(frozen=True)
class Job:
    """`generate` of `tokens` new tokens with a kind of cache; no cache: a forward of a prompt."""

    cache: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.cache} cache, batch {self.batch}" if self.cache else f"prefill {self.tokens}"


def compile_model(model: Any, way: str) -> None:
    if way == "fixpass":
        integration.compile(model)
    elif way != "eager":
        model.compile(options={"freezing": True} if way == "freezing" else None)


def serve(connection: Connection, case: Case, way: str) -> None:
    """Answer each job with its seconds, and None with the peak of memory in bytes; then end."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    # Each graph is compiled here, so that its memory counts.
    inductor_config.fx_graph_cache = functorch_config.enable_autograd_cache = False
    inductor_config.compile_threads = 1
    torch.set_num_threads(case.threads)
    model = case.build()
    compile_model(model, way)
    with torch.no_grad():
        while (job := connection.recv()) is not None:
            run = _runner(model, job)
            start = time.perf_counter()
            run()
            connection.send(time.perf_counter() - start)
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


def _runner(model: Any, job: Job) -> Any:
    length = PROMPT if job.cache else job.tokens
    tokens = torch.arange(job.batch * length).view(job.batch, length) % VOCABULARY
    if not job.cache:
        return partial(model, tokens, use_cache=False, logits_to_keep=1)
    count = {"max_new_tokens": job.tokens, "min_new_tokens": job.tokens}
    return partial(
        model.generate,
        tokens,
        attention_mask=torch.ones_like(tokens),
        cache_implementation=job.cache,
        do_sample=False,
        pad_token_id=0,
        **count,
    )

"""`python -m fixpass demo`: a Qwen3 with packed QKV, compiled, explained, checked and timed."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fixpass
from fixpass.packed import pack_qkv

SEQUENCE, NEW_TOKENS = 128, 16


def build_model(num_layers: int = 4, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A Qwen3ForCausalLM with a small random config, and tokens (1, SEQUENCE) for it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
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
    return model, torch.randint(0, 512, (1, SEQUENCE))

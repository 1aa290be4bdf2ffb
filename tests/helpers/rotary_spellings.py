"""Spellings of the rotation (RoPE) of heads x (..., head_size) by tables cos and sin."""

import torch


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def neox(x, cos, sin):
    """Llama and Qwen3 in transformers."""
    return x * cos + rotate_half(x) * sin


def neox_partial(x, cos, sin):
    """GPT-NeoX in transformers: the other columns stay."""
    size = cos.shape[-1]
    return torch.cat((neox(x[..., :size], cos, sin), x[..., size:]), -1)


def neox_half_tables(x, cos, sin):
    """vLLM: a column of the tables for each pair."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def neox_float(x, cos, sin):
    """The rotation in float32."""
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def gptj_half_tables(x, cos, sin):
    """vLLM, GPT-J's pairs."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def gptj_partial(x, cos, sin):
    size = 2 * cos.shape[-1]
    return torch.cat((gptj_half_tables(x[..., :size], cos, sin), x[..., size:]), -1)


def gptj(x, cos, sin):
    """GLM and Cohere in transformers."""
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + rotated * sin


def flux(x, cos, sin):
    """FLUX in diffusers."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((-b, a), -1).flatten(-2)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


# Each spelling, the columns of its tables for heads of 128, and the tables' dtype.
SPELLINGS = {
    neox: (128, torch.bfloat16),
    neox_partial: (64, torch.float32),
    neox_half_tables: (64, torch.bfloat16),
    neox_float: (128, torch.bfloat16),
    gptj_half_tables: (64, torch.bfloat16),
    gptj_partial: (32, torch.bfloat16),
    gptj: (128, torch.float32),
    flux: (128, torch.float32),
}

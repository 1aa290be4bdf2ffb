"""Norms with quantised output as models spell them: fp8 and int8, by a given scale, row or group."""

import torch

from helpers.spellings import llama

E4M3FN, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def per_token(x, weight):
    """As vLLM's QuantFP8 spells it in PyTorch."""
    y = llama(x, weight)
    amax, _ = y.abs().max(dim=-1)
    scale = (amax.unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=1 / (448 * 512))
    return (y.to(torch.float32) * scale.reciprocal()).clamp(-448, 448).to(E4M3FN), scale


def per_token_of_torchao(x, weight):
    """Its scale is rounded to the dtype of the activations."""
    y = llama(x, weight)
    scale = (y.abs().amax(dim=[-1], keepdim=True) / 448.0).to(torch.float32)
    return torch.clamp(y.to(torch.float32) / scale, min=-448.0, max=448.0).to(E4M3FN), scale


def per_group(x, weight):
    """As vLLM and SGLang spell blocks of 128; the scales lose their last dimension."""
    y = llama(x, weight)
    grouped = y.view(-1, y.shape[-1] // 128, 128)
    scale = grouped.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    codes = (grouped / scale).clamp(min=-448.0, max=448.0).to(E4M3FN)
    return codes.view(y.shape), scale.squeeze(-1)


def per_token_int8(x, weight):
    y = llama(x, weight)
    scale = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127.0
    return torch.round(y / scale).clamp(-128, 127).to(torch.int8), scale


def clamped_before_it_is_rounded(x, weight):
    y = llama(x, weight)
    scale = y.float().abs().amax(-1, True) / 127.0
    return (y * (1.0 / scale)).clamp(-127, 127).round().to(torch.int8), scale


def fnuz(x, weight):
    y = llama(x, weight)
    scale = y.abs().amax(-1, keepdim=True).float() / 224.0
    return (y / scale).clamp(-224.0, 224.0).to(E4M3FNUZ), scale


def static(x, weight, scale):
    return (llama(x, weight).to(torch.float32) * scale.reciprocal()).clamp(-448, 448).to(E4M3FN)


def static_divided(x, weight, scale):
    return (llama(x, weight) / scale).clamp(-448, 448).to(E4M3FN)


def static_inverse(x, weight, inverse):
    return (inverse * llama(x, weight).float()).clamp(-448, 448).to(E4M3FN)


def add_static(x, residual, weight, scale):
    total = x + residual
    return static(total, weight, scale), total


def add_per_group(x, residual, weight):
    total = x + residual
    return (*per_group(total, weight), total)


def rows(*shape, dtype=torch.bfloat16):
    """Random rows whose size is known when the number of rows is not, as weights make it known."""
    x = torch.randn(shape).to(dtype)
    torch._dynamo.mark_static(x, x.dim() - 1)
    return x

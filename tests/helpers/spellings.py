"""Norms as real models write them, and the layouts that they meet."""

import torch


def llama(x, weight):
    """Cast back, then multiply: also Qwen, Mistral, Granite, GLM-4, Phi-3."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def gemma(x, weight):
    """1 + weight, in float32."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def t5(x, weight):
    """x itself is scaled, and promoted by that."""
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(weight.dtype)


def olmo(x, weight):
    """Multiply in float32, then cast."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight * h).to(x.dtype)


def cohere(x, weight):
    """A layer norm written out, without bias."""
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    return (weight.to(torch.float32) * h).to(x.dtype)


def heads(qkv, weight):
    """q as a view of packed qkv (rows, 3072): 8 heads of 128, normalised."""
    return llama(qkv[:, :1024].view(-1, 8, 128), weight)

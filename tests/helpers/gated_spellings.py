"""Norms with a gate as models spell them: the gate in front or behind, rounded or not."""

import torch
import torch.nn.functional as F

from helpers.spellings import llama, olmo


def norm_then_gate(x, packed, weight):
    """As Qwen3-Next: z is a slice of a packed projection."""
    z = packed[:, 8:].reshape(-1, 16)
    return (llama(x.reshape(-1, 16), weight) * F.silu(z.float())).to(x.dtype).view(x.shape)


def gate_then_groups(x, packed, weight):
    """As Mamba-2 of NemotronH and Zamba2: the weight spans the groups."""
    h = x.float() * F.silu(packed[..., 64:].float())
    g = h.view(-1, 4, 16)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * g.view(-1, 64).to(x.dtype)


def sigmoid_gate(x, gate, weight):
    """As Kimi Linear, in float32 to the end."""
    return (olmo(x.float(), weight.float()) * torch.sigmoid(gate.float())).to(x.dtype)


def rounded_gate(x, gate, weight):
    """Everything in 16 bits: the activation is rounded, and so is the product."""
    return llama(x, weight) * F.silu(gate)


def rounded_sigmoid_in_front(x, gate, weight):
    return llama(torch.sigmoid(gate) * x, weight)


def gate_in_float32(x, gate, weight):
    return olmo(x * F.silu(gate), weight)

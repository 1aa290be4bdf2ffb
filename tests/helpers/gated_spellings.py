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


def also_read(x, gate, weight):
    y = llama(x, weight)
    return y * torch.sigmoid(gate), y


def gated_by_itself(x, gate, weight):
    """As AXK2: the gate is computed from the norm."""
    y = llama(x, weight)
    return y * torch.sigmoid(y + gate)


def gate_for_all_rows(x, gate, weight):
    return llama(x, weight) * F.silu(gate[:1])


def biased(x, gate, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight * h.to(x.dtype) + weight) * F.silu(gate)


def product_kept(x, gate, weight):
    h = x * F.silu(gate)
    return llama(h, weight), h


def viewed_in_front(x, gate, weight):
    return llama((x * F.silu(gate)).view(-1, 2, 32), weight[:32])


def wide_product_of_a_rounded_gate(x, gate, weight):
    return llama(x.float() * F.silu(gate), weight)


def named(x, gate, weight):
    y = torch.ops.fixpass.rms_norm(x, weight, None, 1e-6, kernel_name="inductor")
    return y * torch.sigmoid(gate)


def its_own_gate(x, gate, weight):
    y = llama(x, weight)
    return y * torch.sigmoid(y)


def gate_of_integers(x, gate, weight):
    return llama(x, weight) * torch.sigmoid(gate.float() * 20).to(torch.int32)


def groups_in_float64(x, gate, weight):
    g = x.double().view(-1, 4, 16)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return g.view(-1, 64) * weight * torch.sigmoid(gate)


# The reason why each gate stays.
LEFT = {
    also_read: "rms_norm is also read by output, so its gate stays",
    gated_by_itself: "rms_norm is also read by add_1, so its gate stays",
    gate_for_all_rows: "mul_2 broadcasts x bf16[5, 64] or its gate bf16[1, 64]",
    biased: "a bias stands between the norm and its gate",
    product_kept: "mul is also read by output, so its gate stays",
    viewed_in_front: "the gated mul is viewed in front of the norm",
    wide_product_of_a_rounded_gate: "mul is computed in f32, not bf16",
    its_own_gate: "rms_norm is its own gate",
    gate_of_integers: "the activation is computed in i32",
    groups_in_float64: "the norm is computed in f64",
    named: "the model asks for inductor, which has no gate",
}

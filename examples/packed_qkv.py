"""A Qwen3 whose q, k and v projections are one matmul, as serving engines run it.

    python examples/packed_qkv.py

The attention gets slices of one packed tensor, and some norm kernels cannot read those. The program
prints what fixpass does about it on an AMD GPU. The GPU need not be here.
"""

from typing import Any

import torch
from torch import Tensor, nn

import fixpass


def build(num_layers: int = 4, width: int = 256) -> tuple[nn.Module, tuple[Tensor]]:
    """A packed Qwen3ForCausalLM in bfloat16 with random weights, and its arguments."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": num_layers}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, **sizes, **heads)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return pack_qkv(model).to(torch.bfloat16), (torch.randint(0, 512, (1, 128)),)


def pack_qkv(model: nn.Module) -> nn.Module:
    """Pack, in place, each attention that has q_proj, k_proj and v_proj; return the model."""
    for attention in [m for m in model.modules() if "q_proj" in dict(m.named_children())]:
        _pack(attention)
    return model


def _pack(attention: Any) -> None:
    parts = [getattr(attention, f"{name}_proj") for name in "qkv"]
    attention.qkv_proj = nn.Linear(1, 1, parts[0].bias is not None)
    for kind in dict(attention.qkv_proj.named_parameters()):
        packed = nn.Parameter(torch.cat([getattr(part, kind).detach() for part in parts]))
        setattr(attention.qkv_proj, kind, packed)
    sizes, base = [part.out_features for part in parts], type(attention)
    for i, name in enumerate("qkv"):  # the part of the packed tensor, in place of a projection
        part = type("Part", (nn.Module,), {"forward": lambda _, qkv, i=i: qkv.split(sizes, -1)[i]})
        setattr(attention, f"{name}_proj", part())

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, self.qkv_proj(hidden_states), *args, **kwargs)

    attention.__class__ = type(f"Packed{base.__name__}", (base,), {"forward": forward})


if __name__ == "__main__":
    packed_model, inputs = build(num_layers=1)
    print(fixpass.explain(packed_model, *inputs, target="rocm:gfx942"))

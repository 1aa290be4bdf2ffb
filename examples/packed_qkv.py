"""A Qwen3 whose q, k and v projections are one matmul, as serving engines run it.

The attention gets strided slices of one packed tensor: some norm kernels cannot read those.
    python -m fixpass explain examples/packed_qkv.py:build --target rocm:gfx942
"""

from typing import Any

import torch
from torch import Tensor, nn


def build(num_layers: int = 4, width: int = 256) -> tuple[nn.Module, tuple[Tensor]]:
    """A packed Qwen3ForCausalLM in bfloat16 with random weights, and its arguments."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": num_layers}
    sizes["vocab_size"] = 512
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return pack_qkv(model).to(torch.bfloat16), (torch.randint(0, 512, (1, 128)),)


def pack_qkv(model: nn.Module) -> nn.Module:
    """Pack, in place, each attention that has q_proj, k_proj and v_proj; return the model."""
    has_parts = {"q_proj", "k_proj", "v_proj"}.issubset
    for module in [m for m in model.modules() if has_parts(dict(m.named_children()))]:
        _pack(module)
    return model


def _pack(attention: Any) -> None:
    parts = [getattr(attention, f"{name}_proj") for name in "qkv"]
    attention.qkv_proj = nn.Linear(parts[0].in_features, 0, parts[0].bias is not None)
    for kind, _ in list(attention.qkv_proj.named_parameters()):
        packed = nn.Parameter(torch.cat([getattr(part, kind).detach() for part in parts]))
        setattr(attention.qkv_proj, kind, packed)
    stop = 0
    for name, part in zip("qkv", parts, strict=True):
        start, stop = stop, stop + part.out_features
        setattr(attention, f"{name}_proj", Columns(slice(start, stop)))
    base = type(attention)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, self.qkv_proj(hidden_states), *args, **kwargs)

    attention.__class__ = type(f"Packed{base.__name__}", (base,), {"forward": forward})


class Columns(nn.Module):
    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, packed: Tensor) -> Tensor:
        return packed[..., self.columns]

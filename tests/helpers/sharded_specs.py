"""How small models of diffusers are made, and the inputs of their forward."""

from dataclasses import dataclass, field
from typing import Any

from fixpass.weights import Mapping


@dataclass(frozen=True)
class Spec:
    """How a model is made; `units` it is sharded into by the rule `rule`; nested ones skipped."""

    options: dict[str, Any]
    rule: str
    units: int
    mapping: Mapping = field(default_factory=Mapping)


_JOINT = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}

DIFFUSERS = {
    "FluxTransformer2DModel": Spec(
        {
            **_JOINT,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        "block-class",
        4,
    ),
    "HunyuanVideoTransformer3DModel": Spec(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        "block-class",
        6,
    ),
    "Lumina2Transformer2DModel": Spec(
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        "block-class",
        4,
    ),
    "QwenImageTransformer2DModel": Spec(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        "block-class",
        2,
    ),
    "SD3Transformer2DModel": Spec(
        {
            "sample_size": 16,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
        },
        "block-class",
        2,
    ),
    # Its third match, a norm at the end, has no parameters.
    "SanaTransformer2DModel": Spec(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 16,
        },
        "block-class",
        3,
    ),
    "WanTransformer3DModel": Spec(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        "block-class",
        2,
    ),
    "HunyuanDiT2DModel": Spec(
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 24,
            "activation_fn": "gelu-approximate",
        },
        "common-numbered-block",
        2,
    ),
    "UNet2DConditionModel": Spec(
        {
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 2,
            "sample_size": 16,
        },
        "block-class",
        11,
    ),
}

_IMAGE = {"hidden_states": (1, 4, 16, 16), "timestep": 3}
# Shapes are of normal values; lists are the values themselves.
INPUTS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "hidden_states": (1, 16, 4),
        "encoder_hidden_states": (1, 8, 32),
        "pooled_projections": (1, 32),
        "timestep": 1.0,
        "txt_ids": (8, 3),
        "img_ids": (16, 3),
    },
    "HunyuanVideoTransformer3DModel": {
        "hidden_states": (1, 4, 1, 8, 8),
        "encoder_hidden_states": (1, 12, 16),
        "pooled_projections": (1, 8),
        "encoder_attention_mask": [[1.0] * 12],
        "guidance": 1.0,
        "timestep": 3,
    },
    "Lumina2Transformer2DModel": {
        **_IMAGE,
        "encoder_hidden_states": (1, 8, 32),
        "encoder_attention_mask": [[True] * 8],
    },
    "QwenImageTransformer2DModel": {
        "hidden_states": (1, 16, 16),
        "encoder_hidden_states": (1, 7, 16),
        "encoder_hidden_states_mask": [[1] * 7],
        "timestep": 3.0,
    },
    "SD3Transformer2DModel": {
        **_IMAGE,
        "encoder_hidden_states": (1, 8, 32),
        "pooled_projections": (1, 64),
    },
    "SanaTransformer2DModel": {**_IMAGE, "encoder_hidden_states": (1, 8, 8)},
    "WanTransformer3DModel": {
        "hidden_states": (1, 4, 2, 8, 8),
        "encoder_hidden_states": (1, 12, 16),
        "timestep": 3,
    },
    "UNet2DConditionModel": {
        "sample": (1, 4, 16, 16),
        "timestep": 3,
        "encoder_hidden_states": (1, 4, 8),
    },
}

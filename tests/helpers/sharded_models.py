"""Small models of real diffusers and transformers classes, with random weights, to be sharded.

`build(name, seed)` makes one and `inputs(name)` what its forward takes. `UNITS` says what each
resolves to. Nothing is downloaded.
"""

import diffusers
import torch
import transformers

from fixpass.weights import GATED_EXPERTS, MIXTRAL_EXPERTS, PLAIN_EXPERTS, Mapping, Rename
from helpers.sharded_specs import DIFFUSERS, INPUTS, Spec


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
_HEADS = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_MIXTURE = {**_HEADS, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GATED = Mapping(experts=(GATED_EXPERTS,))

TRANSFORMERS = {
    "T5EncoderModel": Spec(
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        "block-class",
        2,
    ),
    "LlamaModel": Spec({**_TEXT, "num_key_value_heads": 2}, "block-class", 2),
    "Gemma2Model": Spec(_HEADS, "block-class", 2),
    "CLIPTextModel": Spec(
        {**_TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2},
        "block-class",
        3,
    ),
    "Qwen3Model": Spec(_HEADS, "block-class", 2),
    "Qwen3ForCausalLM": Spec({**_HEADS, "tie_word_embeddings": True}, "block-class", 2),
    "NemotronHForCausalLM": Spec(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_shared_experts": 1,
        },
        "block-class",
        3,
        Mapping((Rename("backbone.", "model."),), experts=(PLAIN_EXPERTS,)),
    ),
    "MixtralForCausalLM": Spec(
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        "block-class",
        2,
        Mapping((Rename(".block_sparse_moe.", ".mlp.", "inside"),), experts=(MIXTRAL_EXPERTS,)),
    ),
    "Qwen2MoeForCausalLM": Spec(
        {**_MIXTURE, "num_experts": 12, "shared_expert_intermediate_size": 16},
        "block-class",
        2,
        _GATED,
    ),
    "OlmoeForCausalLM": Spec(
        {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
        "block-class",
        2,
        _GATED,
    ),
    "GraniteMoeHybridForCausalLM": Spec(
        {
            **_TEXT,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": ["attention", "attention"],
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
        },
        "block-class",
        2,
        Mapping(
            (
                Rename("_moe.input_linear.weight", "_moe.experts.gate_up_proj", "suffix"),
                Rename("_moe.output_linear.weight", "_moe.experts.down_proj", "suffix"),
                Rename(".router.layer.weight", ".router.weight", "suffix"),
            ),
            experts=(GATED_EXPERTS,),
        ),
    ),
}

SPECS = DIFFUSERS | TRANSFORMERS
MIXTURES = ("NemotronH", "Mixtral", "Qwen2Moe", "Olmoe", "GraniteMoeHybrid")


def build(name, seed=0):
    """The model, with the weights that `seed` makes."""
    torch.manual_seed(seed)
    options = SPECS[name].options
    if name in DIFFUSERS:
        return getattr(diffusers, name)(**options).eval()
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options)).eval()


def inputs(name):
    """The keywords of a forward."""
    if name in TRANSFORMERS:
        return {"input_ids": torch.arange(12)[None]}
    made = {}
    for key, value in INPUTS[name].items():
        if isinstance(value, tuple):
            made[key] = _normal(*value)
        else:
            made[key] = torch.tensor(value if isinstance(value, list) else [value])
    if name == "QwenImageTransformer2DModel":
        made["img_shapes"] = [(1, 4, 4)]
    return made


def forward(name, model):
    """The first output of the model, without a gradient."""
    with torch.no_grad():
        return model(**inputs(name))[0]

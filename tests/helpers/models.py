"""Small `transformers` models with random weights, and what fixpass must find in each.

`build(name)` gives a model of the real class, of two layers, with norm weights and biases between
0.5 and 1.5, so that a norm taken for another one shows in the result. Every expert of a mixture
is asked: rounding then cannot choose another one. Nothing is downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fixpass import Report

# How far a result may be from eager, as a part of its largest element: twice the worst error that
# Inductor itself has over these models, rounded up. docs/models.md holds what was measured.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-2}

BATCH, VOCABULARY = 2, 128

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SMALL, "intermediate_size": 128, "vocab_size": VOCABULARY}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Norms:
    """How many of a model's norms become which op; `missed` holds the reasons of the others."""

    rms_norm: int = 0
    layer_norm: int = 0
    add_rms_norm: int = 0
    missed: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.rms_norm + self.layer_norm + self.add_rms_norm + len(self.missed)


@dataclass(frozen=True)
class Spec:
    """How a model is made. `why_not_fullgraph` is empty where Inductor takes it as one graph."""

    cls: str
    config: str
    options: Mapping[str, Any]
    norms: Norms
    has_cache: bool = True
    why_not_fullgraph: str = ""


@dataclass(frozen=True)
class Model:
    """A built model and its inputs. A length counts tokens, and images where there are no tokens."""

    name: str
    module: nn.Module
    norms: Norms
    has_cache: bool
    why_not_fullgraph: str
    ids: Tensor = field(repr=False)

    @property
    def fullgraph(self) -> bool:
        return not self.why_not_fullgraph

    @property
    def norm_modules(self) -> tuple[str, ...]:
        """The paths of the modules whose class is a norm."""
        modules = self.module.named_modules()
        return tuple(path for path, module in modules if "Norm" in type(module).__name__)

    def prefill(self, length: int = 12) -> dict[str, Any]:
        """Keywords of a call on `length` new tokens; a cache is made by the model itself."""
        if self.name == "vit":
            generator = torch.Generator().manual_seed(length)
            images = torch.randn(length, 3, 32, 32, generator=generator)
            return {"pixel_values": images.to(self.module.dtype)}
        cached = {"use_cache": True} if self.has_cache else {}
        return {"input_ids": self.ids[:, :length], **cached}

    def decode(self, length: int = 12, *, static: bool = False) -> dict[str, Any]:
        """Keywords of a call on one token behind `length` cached ones, in a cache of their own."""
        from transformers import DynamicCache, StaticCache

        config = self.module.config
        cache = StaticCache(config, max_cache_len=16) if static else DynamicCache(config=config)
        with torch.no_grad():
            self.module(**self.prefill(length), past_key_values=cache)
        token = self.ids[:, length : length + 1]
        return {"input_ids": token, "past_key_values": cache, "use_cache": True}


_RMS = Norms(rms_norm=2, add_rms_norm=3)
_RMS_QK = Norms(rms_norm=6, add_rms_norm=3)
_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers_block_type": ["mamba", "attention", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
}

SPECS: Mapping[str, Spec] = {
    "llama": Spec("LlamaForCausalLM", "LlamaConfig", _GROUPED, _RMS),
    "qwen2": Spec("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, _RMS),
    "qwen3": Spec("Qwen3ForCausalLM", "Qwen3Config", _HEADS, _RMS_QK),
    "qwen3-packed": Spec("Qwen3ForCausalLM", "Qwen3Config", _HEADS, _RMS_QK),
    "persimmon": Spec(
        "PersimmonForCausalLM",
        "PersimmonConfig",
        {**_TEXT, "qk_layernorm": True},
        Norms(layer_norm=9),
    ),
    "qwen3-moe": Spec(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_HEADS, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 4},
        _RMS_QK,
    ),
    "gemma2": Spec("Gemma2ForCausalLM", "Gemma2Config", _HEADS, _RMS_QK),
    "gemma3": Spec(
        "Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS, Norms(rms_norm=10, add_rms_norm=3)
    ),
    "mistral": Spec("MistralForCausalLM", "MistralConfig", _HEADS, _RMS),
    "mixtral": Spec(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 4},
        _RMS,
    ),
    "phi3": Spec("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, **_TOKENS}, _RMS),
    "olmo2": Spec("Olmo2ForCausalLM", "Olmo2Config", {**_GROUPED, **_TOKENS}, Norms(rms_norm=9)),
    "granite": Spec(
        "GraniteForCausalLM",
        "GraniteConfig",
        {**_GROUPED, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
        _RMS,
    ),
    "glm4": Spec("Glm4ForCausalLM", "Glm4Config", {**_HEADS, **_TOKENS}, _RMS_QK),
    "cohere": Spec(
        "CohereForCausalLM",
        "CohereConfig",
        {**_GROUPED, **_TOKENS, "use_qk_norm": True},
        Norms(layer_norm=7),
    ),
    "gpt-neox": Spec("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, Norms(layer_norm=5)),
    "nemotron-h": Spec(
        "NemotronHForCausalLM", "NemotronHConfig", _MAMBA, Norms(rms_norm=3, add_rms_norm=2)
    ),
    "t5-encoder": Spec(
        "T5EncoderModel",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        _RMS,
        has_cache=False,
    ),
    "bert": Spec("BertModel", "BertConfig", _TEXT, Norms(layer_norm=5), has_cache=False),
    "vit": Spec(
        "ViTModel",
        "ViTConfig",
        {**_SMALL, "intermediate_size": 128, "image_size": 32, "patch_size": 8},
        Norms(layer_norm=5),
        has_cache=False,
    ),
}
NAMES = tuple(SPECS)


def build(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """The model `name` in `dtype`; the same weights and inputs at each call."""
    import transformers

    spec = SPECS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, spec.config)(**spec.options)
        module = getattr(transformers, spec.cls)(config).eval()
        _randomise(module)
        ids = torch.randint(3, VOCABULARY, (BATCH, 16))
    if name == "qwen3-packed":
        from examples.packed_qkv import pack_qkv

        pack_qkv(module)
    return Model(name, module.to(dtype), spec.norms, spec.has_cache, spec.why_not_fullgraph, ids)


def outputs(compiled: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a call returns first, and the tensors of its cache after the call."""
    with torch.no_grad():
        result = compiled(**kwargs)
    found = {"result": result[0]}
    cache = result.get("past_key_values")
    for i, layer in enumerate(cache.layers if cache is not None else ()):
        tensors = ((name, value) for name, value in vars(layer).items())
        found |= {f"cache.{i}.{n}": v for n, v in tensors if isinstance(v, Tensor)}
    return found


def norms_on(report: Report) -> Norms:
    """What a report says of the norms: how many became which op, and why others did not."""
    remarks = report.of_pass("canonicalize-norms")
    texts = [remark.text for remark in remarks if remark.kind == "applied"]
    joined = sum("joined as add_rms_norm" in text for text in texts)
    return Norms(
        rms_norm=sum("became rms_norm" in text for text in texts) - joined,
        layer_norm=sum("became layer_norm" in text for text in texts),
        add_rms_norm=sum("became add_rms_norm" in text for text in texts) + joined,
        missed=tuple(remark.text for remark in remarks if remark.kind != "applied"),
    )


def _randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for child in module.modules():
            is_norm = "Norm" in type(child).__name__
            for parameter in child.parameters(recurse=False):
                if is_norm:
                    parameter.uniform_(0.5, 1.5)
                elif parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)

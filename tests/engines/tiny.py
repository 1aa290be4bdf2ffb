"""Tiny checkpoints with random weights, made on the spot for tests and benchmarks of engines.

Norm weights lie between 0.5 and 1.5, so that a norm with the wrong weight shows. Nothing is
downloaded, and there is no tokenizer: engines are given token numbers.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
NAMES = ("qwen3", "llama", "qwen3-moe")


def build(name, seed=0, **changes):
    """A model of the family `name`; `changes` go over the configuration."""
    import transformers

    families = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3-moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, EXPERTS),
    }
    config_class, model_class, more = families[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **more, **changes})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                # Wide enough that one token is clearly the likeliest.
                parameter.mul_(4)
    return model


def write(name, folder, dtype="float32", seed=0, **changes):
    """Write a checkpoint of that model into `folder`; return the folder as text.

    With a name such as `qwen3-fp8` the linear layers are in FP8, as compressed-tensors stores them:
    with a scale for each row of a weight, and for each token.
    """
    family = name.removesuffix("-fp8")
    model = build(family, seed, **changes).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if family != name:
        _quantise(Path(folder))
    return str(folder)


def _quantise(folder):
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        values = tensors[name].float()
        scale = values.abs().amax(1, keepdim=True) / 448
        tensors[name] = (values / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, file, {"format": "pt"})
    weights = {"strategy": "channel", "dynamic": False}
    inputs = {"strategy": "token", "dynamic": True}
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": kind | weights, "input_activations": kind | inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    facts = json.loads(config.read_text()) | {"quantization_config": quantization}
    config.write_text(json.dumps(facts))


def prompts(count, longest, seed=0):
    """`count` prompts of mixed length, from 1 to `longest` tokens, as lists of token numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]

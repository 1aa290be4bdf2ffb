"""What ranks do in tests of tensor parallel `transformers` models."""

import os

import torch
import torch.distributed as dist

TOKENS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}


def generate(folder, prompts, tokens, options):
    """Tokens without and with fixpass, of a model that is spread over the ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from fixpass import last_reports
    from fixpass.integrations.transformers import compile

    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    spread = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=spread).eval()
    want = model.generate(prompts, **tokens)
    compile(model, **options)
    got = model.generate(prompts, **tokens)
    weight = model.model.layers[0].self_attn.q_proj.weight
    local = weight.to_local() if isinstance(weight, torch.distributed.tensor.DTensor) else weight
    return want, got, tuple(local.shape), "\n".join(map(str, last_reports()))

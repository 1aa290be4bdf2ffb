"""Decode with tensor parallelism on two ranks of one machine, all-reduces in symmetric memory.

    torchrun --nproc-per-node 2 examples/tensor_parallel_decode.py

transformers splits a small Llama over the ranks. Each layer ends two row-parallel matmuls in an
all-reduce. fixpass finds them in the graph: a matmul writes its part where the other rank reads it.
"""

import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fixpass
from fixpass.integrations import transformers

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
DECODE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    whole = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    prompt = torch.randint(0, 512, (1, 4))
    expected = whole.generate(prompt, **DECODE)

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)  # both ranks load what rank 0 saves
        whole.save_pretrained(folder[0])
        dist.barrier()
        spread = DistributedConfig(tp_plan="auto")
        split = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=spread).eval()
        dist.barrier()
    transformers.compile(split, lower="eager")
    tokens = split.generate(prompt, **DECODE)

    if dist.get_rank() == 0:
        layer = split.model.layers[0].mlp.down_proj.weight
        print("this rank's part of down_proj:", tuple(layer.to_local().shape))
        for remark in fixpass.last_reports()[-1].of_pass("place-symmetric-memory"):
            print(remark)
        print("tokens of the unsplit model:", torch.equal(tokens, expected))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

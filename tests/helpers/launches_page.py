"""Count the launches of norms in real models, and write `docs/launches.md`.

    make launches-page

The models are those of `tests/helpers/models.py` and the mixtures and state space models below. The
target's report gives the launches; Inductor's kernels are counted in the C++ that it generates here.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import metrics

from fixpass import Report, explain
from helpers.models import NAMES, build

PAGE = Path(__file__).resolve().parents[2] / "docs/launches.md"
TARGETS = ("cuda:sm_90", "rocm:gfx942")
HEAD = """\
# Launches of norms

Real `transformers` classes with small random configurations in bf16 (two layers unless the name says
otherwise), a prefill of two sequences of 12 tokens. *Norms* counts the norms that the report found.
*Launches* are those of these norms, with the copies that their kernels need: "first" with the first
kernel of the target for each norm, "chosen" with the kernels that fixpass chose. *Kernels of
Inductor* are all loops of the whole model, norms and neighbours, in the C++ that Inductor generates
on this machine, without fixpass and with it; they differ in models with
layer norms, which fixpass decomposes in its own way. No launch was made on a GPU.

| model | norms | sm_90: first | sm_90: chosen | gfx942: first | gfx942: chosen | kernels of Inductor | with fixpass |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": (
        "Qwen3Next",
        {
            **_SMALL,
            **_MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_SMALL,
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
}


def main() -> None:
    warnings.simplefilter("ignore")
    lines = []
    for name in (*NAMES, *MORE):
        lines.append(_row(name))
        print(lines[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n\n`make launches-page` writes this page.\n")


def _row(name: str) -> str:
    module, inputs = _model(name)
    cells: list[object] = [name]
    with torch.no_grad():
        reports = [explain(module, target=target, **inputs) for target in TARGETS]
        chosen = [choice for choice in _choices(reports[0]) if choice.launches > 0]
        cells.append(sum(choice.num_norms for choice in chosen))
        for report in reports:
            cells.append(sum(choice.first_launches for choice in _choices(report)))
            cells.append(sum(choice.launches for choice in _choices(report)))
        cells += [_kernels(name, backend) for backend in ("inductor", "fixpass")]
    return "| " + " | ".join(map(str, cells)) + " |"


def _choices(report: Report) -> list[Any]:
    return [remark.choice for remark in report.remarks if remark.choice is not None]


def _kernels(name: str, backend: str) -> int:
    """The loops in the code that Inductor generates for the model."""
    module, inputs = _model(name)
    torch._dynamo.reset()
    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        torch.compile(module, backend=backend)(**inputs)
    return int(metrics.generated_kernel_count)


def _model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name not in MORE:
        model = build(name, torch.bfloat16)
        return model.module, model.prefill()
    import transformers

    family, options = MORE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    module = getattr(transformers, f"{family}ForCausalLM")(config).eval().bfloat16()
    return module, {"input_ids": torch.randint(3, 128, (2, 12)), "use_cache": False}


if __name__ == "__main__":
    main()

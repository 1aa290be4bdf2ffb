"""Parts of mappings that many models share."""

from fixpass.runtime.weights.mapping import ExpertPart, Experts, Stacked

QKV = Stacked("qkv_proj", ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
GATE_UP = Stacked("gate_up_proj", ("gate_proj", "up_proj"))

# The experts of transformers: `gate_up_proj` and `down_proj`, one parameter for all experts.
GATED_EXPERTS = Experts(
    (
        ExpertPart("gate_proj", "gate_up_proj", "w1", (0, 2)),
        ExpertPart("up_proj", "gate_up_proj", "w3", (1, 2)),
        ExpertPart("down_proj", "down_proj", "w2"),
    )
)
MIXTRAL_EXPERTS = Experts(
    (
        ExpertPart("w1", "gate_up_proj", "w1", (0, 2)),
        ExpertPart("w3", "gate_up_proj", "w3", (1, 2)),
        ExpertPart("w2", "down_proj", "w2"),
    )
)
# NemotronH: no gate.
PLAIN_EXPERTS = Experts(
    (ExpertPart("up_proj", "up_proj", "w1"), ExpertPart("down_proj", "down_proj", "w2"))
)
# The experts of serving engines: `w13_weight`, `w2_weight`, `w13_input_scale` and so on.
FUSED_EXPERTS = Experts(
    (
        ExpertPart("gate_proj", "w13_{leaf}", "w1", (0, 2)),
        ExpertPart("up_proj", "w13_{leaf}", "w3", (1, 2)),
        ExpertPart("down_proj", "w2_{leaf}", "w2"),
    )
)

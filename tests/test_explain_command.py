"""`python -m fixpass explain`: models of files and of transformers, what is shown, exit statuses."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fixpass.cli import main
from fixpass.testing import bf16

HERE = f"{__file__}:build"


class Queries(nn.Module):
    """The queries of a packed tensor, and one more norm."""

    def __init__(self):
        super().__init__()
        self.q_norm = nn.RMSNorm(16, dtype=torch.bfloat16)
        self.norm = nn.RMSNorm(192, dtype=torch.bfloat16)

    def forward(self, qkv):
        return self.q_norm(qkv[:, :64].unflatten(-1, (4, 16))), self.norm(qkv)


def build():
    return Queries(), (bf16(5, 192),)


def explained(capsys, *words):
    """The exit status, stdout and stderr of the command."""
    status = main(["explain", *words])
    return status, *capsys.readouterr()


def test_the_figures_come_first_and_progress_goes_to_stderr(capsys):
    status, out, err = explained(capsys, HERE, "--target", "rocm:gfx942")
    assert status == 0
    assert out.splitlines()[:2] == [
        "target rocm:gfx942",
        "On rocm:gfx942: 1 of 2 norms reads a strided layout without a copy; the norms take "
        "2 launches instead of 3; 1,280 bytes not moved.",
    ]
    assert "fixpass: tracing Queries, 208 parameters" in err
    assert "fixpass: passes over the inference graph of" in err


def test_one_pass_and_one_site_may_be_shown_alone(capsys):
    words = ("--pass", "select-norm-kernel", "--only", "q_norm", "--json")
    _, out, _ = explained(capsys, HERE, *words)
    remarks = json.loads(out)["remarks"]
    assert [(r["pass_name"], r["where"]) for r in remarks] == [("select-norm-kernel", "q_norm")]
    assert remarks[0]["choice"]["kernel"] == "inductor"


def test_a_selection_of_nothing_is_said(capsys):
    _, _, err = explained(capsys, HERE, "--only", "v_norm")
    assert "no remark is left of these passes at these sites" in err


def test_the_diff_shows_what_a_pass_changed(capsys):
    _, out, _ = explained(capsys, HERE, "--diff", "--pass", "canonicalize-norms")
    assert out.startswith("canonicalize-norms (inference graph, ")
    changed = [line for line in out.splitlines() if line[0] in "+-"]
    assert any("rsqrt" in line and line[0] == "-" for line in changed)
    assert sum("fixpass.rms_norm" in line and line[0] == "+" for line in changed) == 2
    assert "lower-norms" not in out


def test_dynamic_shapes_are_symbols(capsys):
    _, out, _ = explained(capsys, HERE, "--dynamic")
    assert "bf16[s0, 4, 16]" in out


def test_training_has_a_forward_and_a_backward_graph(capsys):
    _, _, err = explained(capsys, HERE, "--train")
    assert "the forward graph" in err
    assert "the backward graph" in err


def test_an_expectation_that_fails_is_the_exit_status(capsys):
    assert explained(capsys, HERE, "--expect", "q_norm=inductor")[0] == 0
    status, out, err = explained(capsys, HERE, "--expect", "q_norm=strided_rms_norm")
    assert status == 2
    assert "strided_rms_norm is expected; it got inductor" in err
    assert "target cpu" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((HERE, "--pass", "nothing"), "--pass: unknown 'nothing'; known: functionalize-norms"),
        ((HERE, "--expect", "q_norm"), "--expect 'q_norm': say SITE=KERNEL"),
        ((HERE, "--set", "hidden_size=3"), "--set is for hf:CLASS"),
        (("hf:Qwen3ForCausalLM", "--set", "hidden_size"), "say NAME=VALUE"),
        (("hf:Qwen3ForCausalLM", "--set", "hidden_sise=8"), "near names: hidden_size"),
        (("hf:Qwen3ForCausalLN",), "near names: Qwen3ForCausalLM"),
        (("hf:Qwen3Config",), "transformers has no model class 'Qwen3Config'"),
    ],
)
def test_a_wrong_word_is_said_on_one_line(words, message, capsys):
    status, out, err = explained(capsys, *words)
    assert (status, out) == (2, "")
    (line,) = (line for line in err.splitlines() if not line.startswith("fixpass: loading "))
    assert line.startswith("fixpass: ")
    assert message in line


def test_a_class_of_transformers_is_made_small_with_random_weights(capsys):
    words = ("--set", "num_hidden_layers=1", "--only", "q_norm", "--json")
    status, out, _ = explained(capsys, "hf:Qwen3ForCausalLM", *words)
    assert status == 0
    remark = json.loads(out)["remarks"][0]
    assert remark["where"] == "model.layers.0.self_attn.q_norm"
    assert Path(remark["stack"][-1]["path"]).name == "modeling_qwen3.py"


@pytest.mark.full
@pytest.mark.parametrize("name", ["ViTModel", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_images_encoders_and_decoders_get_inputs(name, capsys):
    status, out, _ = explained(capsys, f"hf:{name}")
    assert status == 0
    assert "norms over dense tensors" in out

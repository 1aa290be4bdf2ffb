"""Examples that docs/gallery.md does not show run as their first lines say; all are short."""

from pathlib import Path

import pytest
import torch

import fixpass
from examples import packed_qkv
from fixpass.testing import assert_fired
from helpers.models import build
from helpers.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.mark.inductor
def test_the_demo_generates_the_tokens_of_eager():
    output = run_python("demo.py", "1", cwd=EXAMPLES)
    assert "strided_qk_norm_rope reads" in output
    assert "16 greedy tokens are those of eager" in output


def test_a_packed_model_computes_what_the_model_does():
    model = build("qwen3").module
    tokens = torch.randint(3, 128, (2, 12))
    with torch.no_grad():
        want = model(tokens).logits
        torch.testing.assert_close(packed_qkv.pack_qkv(model)(tokens).logits, want)


def test_q_and_k_of_the_packed_model_are_normalised_and_rotated_where_they_lie():
    model, args = packed_qkv.build(num_layers=1)
    report = fixpass.explain(model, *args, target="rocm:gfx942")
    assert_fired(report, {"q_norm": "strided_qk_norm_rope", "k_norm": "strided_qk_norm_rope"})


def test_every_example_is_short_and_runs_in_the_gallery_or_here():
    paths = sorted(EXAMPLES.rglob("*.py"))
    tested = (ROOT / "docs/gallery.md").read_text() + Path(__file__).read_text()
    assert [path.name for path in paths if path.name not in tested] == []
    lengths = {path.name: path.read_text().count("\n") for path in paths}
    assert {name: length for name, length in lengths.items() if length >= 60} == {}

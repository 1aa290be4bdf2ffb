"""Each remark knows the line of the model that it is about."""

import inspect
import json

import pytest
import torch
from torch import nn

import fixpass
from fixpass import Remark, Report
from fixpass.passes.source_lines import SourceLine
from fixpass.testing import bf16
from helpers.models import build


class OwnNorm(nn.Module):
    """RMSNorm as models spell it, in a class of their own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm = OwnNorm()
        self.k_norm = nn.RMSNorm(16, dtype=torch.bfloat16)

    def forward(self, qkv):
        heads = qkv.unflatten(-1, (-1, 16))
        q = self.q_norm(heads[:, :4])
        k = self.k_norm(heads[:, 4:8])
        v = nn.functional.rms_norm(heads[:, 8:], (16,))
        return q, k, v


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, qkv):
        return [layer(qkv) for layer in self.layers]


def number_of(code, owner=Attention):
    """The line of this file where the class has this code."""
    lines, start = inspect.getsourcelines(owner)
    return start + next(i for i, line in enumerate(lines) if code in line)


CALLS = {
    "q_norm": "self.q_norm(heads",
    "k_norm": "self.k_norm(heads",
    "": "nn.functional.rms_norm(heads",
}


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90", "rocm:gfx942"])
@torch.no_grad()
def test_the_line_of_a_norm_is_the_line_that_calls_it(target):
    report = fixpass.explain(Attention(), bf16(5, 192), target=target)
    assert report.remarks
    for remark in report.remarks:
        code = CALLS[remark.where]
        assert remark.line.number == number_of(code)
        assert remark.line.path == __file__
        assert remark.line.function == "forward"
        assert code in remark.line.code


@torch.no_grad()
def test_the_stack_of_a_remark_starts_at_the_model():
    (remark,) = fixpass.explain(Layers(), bf16(5, 192)).of_pass("canonicalize-norms")[:1]
    numbers = [line.number for line in remark.stack if line.path == __file__]
    assert numbers[0] == number_of("for layer in self.layers", Layers)
    assert numbers[-1] == remark.line.number == number_of("self.q_norm(heads")


@torch.no_grad()
def test_the_text_has_lines_where_asked_and_a_snapshot_has_none():
    report = fixpass.explain(Layers(), bf16(5, 192))
    number = number_of("self.q_norm(heads")
    site = f"applied 2 x layers.*.q_norm at test_source_lines.py:{number}: became rms_norm"
    assert site in report.text(with_lines=True)
    assert "test_source_lines" not in str(report)


@torch.no_grad()
def test_the_lines_are_in_the_json():
    data = json.loads(fixpass.explain(Attention(), bf16(5, 192)).to_json())
    last = data["remarks"][0]["stack"][-1]
    assert (last["path"], last["number"]) == (__file__, number_of("self.q_norm(heads"))


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/env/lib/site-packages/transformers/m.py", "transformers/m.py"),
        ("/mine/m.py", "/mine/m.py"),
    ],
)
def test_a_file_of_an_installed_package_has_a_short_path(path, short):
    assert SourceLine(path, 1, "f").short_path == short


def test_one_line_of_the_text_may_stand_for_several_lines_of_the_model():
    remarks = [
        Remark("a", "applied", f"mul_{i}", "same", f"m.{i}", 0, (SourceLine("/m/m.py", i, "f"),))
        for i in (7, 9)
    ]
    assert "applied 2 x m.* at m.py:7 and 1 more: same" in Report(tuple(remarks)).text(
        with_lines=True
    )


@pytest.mark.full
@torch.no_grad()
def test_every_remark_of_a_transformers_model_has_a_line_outside_of_torch():
    model = build("qwen3").module
    report = fixpass.explain(model, torch.randint(3, 100, (1, 4)), target="rocm:gfx942")
    files = {remark.line and remark.line.path.rpartition("/")[2] for remark in report.remarks}
    assert files == {"modeling_qwen3.py"}


def test_the_backward_of_a_norm_has_the_line_of_its_forward():
    model = Attention()
    report = fixpass.explain(model, bf16(5, 192).requires_grad_(), target="rocm:gfx942")
    assert {remark.line.number for remark in report.remarks} == set(map(number_of, CALLS.values()))

"""A rewrite that stops to fire fails the user's test, and the error says why."""

import pytest
import torch
from torch import nn

import fixpass
from fixpass import Remark, Report
from fixpass.passes.base import Choice
from fixpass.passes.source_lines import SourceLine
from fixpass.runtime.errors import ExpectationError
from fixpass.testing import assert_fired, bf16

LINE = (SourceLine("/models/qwen.py", 42, "forward"),)
REPORT = Report(
    (
        Remark("select", "missed", "n_0", "ours: x is dense does not hold", "l.0.q_norm", 0, LINE),
        Remark("select", "missed", "n_0", "other is not installed", "l.0.q_norm", 0, LINE),
        Remark("select", "applied", "n_0", "chosen", "l.0.q_norm", 0, LINE, Choice("inductor", 1)),
        Remark("select", "applied", "n_1", "chosen", "l.1.q_norm", 0, LINE, Choice("ours", 1)),
        Remark("select", "applied", "n_2", "chosen", "l.1.k_norm", 0, LINE, Choice("ours", 1)),
        Remark("join", "applied", "n_1", "joined", "l.1.q_norm", 0, LINE,
               Choice("both", -1, sites=("l.1.q_norm", "l.1.k_norm"))),
    ),
    "target t",
)  # fmt: skip


@pytest.mark.parametrize(
    "expect",
    [
        {},
        {"0.q_norm": "inductor"},
        {"l.1.q_norm": "both"},
        {"k_norm": "both"},
        {"1.?_norm": "both"},
        {"*q_norm": "select"},
        {"k_norm": "join"},
    ],
)
def test_a_site_has_the_kernel_or_the_rewrite_that_is_expected(expect):
    assert_fired(REPORT, expect)


def test_the_error_says_what_the_site_got_where_and_why():
    with pytest.raises(ExpectationError) as failure:
        assert_fired(REPORT, {"q_norm": "ours"})
    assert str(failure.value) == (
        "target t:\n"
        "  l.0.q_norm at qwen.py:42: ours is expected; it got inductor\n"
        "    select: missed: ours: x is dense does not hold\n"
        "  l.1.q_norm at qwen.py:42: ours is expected; it got both\n"
        "    select: applied: chosen\n"
        "    join: applied: joined"
    )


def test_a_site_that_is_not_there_is_an_error_that_lists_the_known():
    known = "modules with remarks: l.0.q_norm, l.1.q_norm, l.1.k_norm"
    with pytest.raises(ExpectationError, match=f"v_norm: no remark is about such.*{known}"):
        assert_fired(REPORT, {"v_norm": "ours"})


def test_a_failed_expectation_is_a_failure_of_a_test():
    with pytest.raises(AssertionError):
        assert_fired(REPORT, {"l.0.q_norm": "join"})


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.RMSNorm(16, dtype=torch.bfloat16)

    def forward(self, qkv):
        return self.q_norm(qkv[:, :64].unflatten(-1, (4, 16)))


@torch.no_grad()
def test_explain_fails_where_a_packed_norm_would_need_a_copy():
    x = bf16(5, 192)
    fixpass.explain(Queries(), x, target="rocm:gfx942", expect={"q_norm": "inductor"})
    with pytest.raises(ExpectationError) as failure:
        fixpass.explain(Queries(), x, target="rocm:gfx942", expect={"q_norm": "aiter_rms_norm"})
    assert "aiter_rms_norm is expected; it got inductor" in str(failure.value)
    assert "aiter_rms_norm: x is dense 2-D does not hold for bf16[5, 4, 16][192, 16, 1]" in str(
        failure.value
    )

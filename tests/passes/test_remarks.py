"""Reports: text for people, JSON for programs."""

import json

from expecttest import assert_expected_inline

from fixpass import Remark, Report
from fixpass.passes.base import Choice
from fixpass.passes.remarks import log_line, reports_from_json, reports_to_json

LAYERS = tuple(
    Remark("a-pass", "applied", f"rms_norm_{i}", f"add_{i} joined s40", f"m.layers.{i}.n", 8)
    for i in range(3)
)
NAMELESS = tuple(Remark("a-pass", "missed", f"rsqrt_{i}", f"add_{i} stays") for i in range(37))
INDUCTOR = Choice("inductor", 1, 2, True, ("x",), ())
ONE, JOINED = Choice("inductor", 1), Choice("strided_qk_norm", -1, sites=("m.q", "m.k"))
OTHER = Remark("b-pass", "missed", "rsqrt", "why not")


def test_remarks_that_differ_in_a_layers_number_share_a_line():
    assert_expected_inline(
        str(Report((*LAYERS, OTHER), "target cpu")),
        """\
target cpu
a-pass
    applied 3 x m.layers.*.n: add_0 joined s0
b-pass
    missed  rsqrt: why not
bytes saved: 24
""",
    )


def test_equal_remarks_on_nodes_of_no_module_share_a_line():
    assert_expected_inline(
        str(Report(NAMELESS)),
        """\
a-pass
    missed  37 x rsqrt: add_0 stays
""",
    )


def test_a_report_is_also_data():
    data = json.loads(Report((*LAYERS, OTHER), "target cpu").to_json())
    assert data["title"] == "target cpu"
    assert data["bytes_saved"] == 24
    assert [r["kind"] for r in data["remarks"]] == ["applied"] * 3 + ["missed"]


def test_reports_add_up_and_are_filtered():
    total = Report(LAYERS) + Report((OTHER,))
    assert total.of_pass("b-pass") == (OTHER,)
    assert total.of_kind("applied") == LAYERS
    assert total.bytes_saved == 24


def norms(number, **facts):
    found = [Remark("canonicalize-norms", "applied", f"norm_{i}", "x") for i in range(number)]
    return (*found, *(Remark("select-norm-kernel", "applied", r.node, "y", **facts) for r in found))


def test_the_summary_tells_unchanged_code_from_changes():
    assert_expected_inline(
        "\n".join(
            log_line(Report(remarks))
            for remarks in (
                norms(13, choice=INDUCTOR),
                norms(1, choice=INDUCTOR),
                norms(4),
                (*norms(13, choice=INDUCTOR), *norms(2), OTHER),
                (),
            )
        ),
        """\
13 norms read their strides in place; Inductor's code is the same
1 norm reads its strides in place; Inductor's code is the same
select-norm-kernel: 4 applied
13 norms read their strides in place; Inductor's code is the same; select-norm-kernel: 2 applied; b-pass: 1 missed
nothing to do""",
    )


def test_norms_that_are_joined_later_are_not_counted_as_the_same_code():
    chosen = (
        Remark("select-norm-kernel", "applied", "x", "y", f"m.{name}", choice=ONE) for name in "qko"
    )
    joined = Remark("join-qk-norms", "applied", "qk_norm", "y", "m.q", choice=JOINED)
    assert_expected_inline(
        log_line(Report((*chosen, joined))),
        """1 norm reads its strides in place; Inductor's code is the same; join-qk-norms: 1 applied""",
    )


def test_reports_are_read_from_the_json_that_they_were_written_to():
    reports = (Report(norms(2, choice=INDUCTOR), "one"), Report((*LAYERS, OTHER)))
    assert reports_from_json(reports_to_json(reports)) == reports

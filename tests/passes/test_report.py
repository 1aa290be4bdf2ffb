"""Reports: text for people, JSON for programs."""

import json

from expecttest import assert_expected_inline

from fixpass import Remark, Report

LAYERS = tuple(
    Remark("a-pass", "applied", f"rms_norm_{i}", f"add_{i} joined s40", f"m.layers.{i}.n", 8)
    for i in range(3)
)
NAMELESS = tuple(Remark("a-pass", "missed", f"rsqrt_{i}", f"add_{i} stays") for i in range(37))
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

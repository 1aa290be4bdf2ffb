"""The tree of the sites, their outcomes and the machine code of the chosen kernels."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import machine_code
from fixpass.passes.base import Choice, Remark
from fixpass.passes.remarks import Report
from fixpass.report.compiled_kernels import TABLE, code_rows
from fixpass.report.module_tree import SiteBody, leaves_of, module_tree, outcomes_of, views_of
from fixpass.report.sites import KernelFacts, SiteFacts

ROOT = Path(__file__).resolve().parents[2]
NORM = SiteFacts("", "", "rms_norm", "", "bf16", 2, (8, 4, 128), (1536, 128, 1),
                 (KernelFacts("strided_rms_norm", (), "8 bytes in 1 launch"),))  # fmt: skip


def views(*sites, kernel="strided_rms_norm", text="chosen", norm=NORM, kind="applied"):
    """A view of each site, with one remark and one norm."""
    remarks = tuple(
        Remark("select", kind, f"n_{i}", text, site, choice=Choice(kernel, 1))
        for i, site in enumerate(sites)
    )
    norms = [replace(norm, node=r.node, where=r.where) for r in remarks]
    return list(views_of(Report(remarks), norms))


def grouped(found):
    numbers = {}
    for view in found:
        numbers.setdefault(SiteBody.of(view), len(numbers))
    return list(leaves_of(found, numbers)), list(numbers)


def outline(branch):
    """(name, names of its sites, its branches), nested."""
    sites = [leaf.name for leaf in branch.sites]
    return branch.name, sites, [outline(inner) for inner in branch.branches]


def test_modules_with_one_module_in_them_are_one_name():
    found = views("model.layers.0.norm", "model.layers.1.norm", "model.layers.1.q.norm", "norm")
    tree = module_tree(grouped(found)[0])
    assert outline(tree) == (
        "", ["norm"],
        [("model.layers", [], [("0", ["norm"], []), ("1", ["norm"], [("q", ["norm"], [])])])],
    )  # fmt: skip
    assert tree.num_sites == 4


def test_sites_of_equal_layers_share_a_body():
    """The numbers of nodes, in remarks too, are no difference."""
    equal = views("a.0.norm", text="fused with mul_1") + views("a.1.norm", text="fused with mul_2")
    other = views("b.norm", text="fused with add")
    assert [leaf.body for leaf in grouped(equal + other)[0]] == [0, 0, 1]


def test_missed_outcomes_come_first_then_the_rarest():
    missed = views("c.norm", kind="missed", kernel="inductor")
    found = views("a.0.norm", "a.1.norm") + views("b.norm", kernel="inductor") + missed
    outcomes = outcomes_of(*grouped(found))
    assert [[leaf.view.where for leaf in outcome.leaves] for outcome in outcomes] == [
        ["c.norm"], ["b.norm"], ["a.0.norm", "a.1.norm"],
    ]  # fmt: skip
    assert outcomes[2].body.cost == "8 bytes in 1 launch"


def test_a_chosen_kernel_of_ours_has_its_machine_code():
    (row,) = code_rows(views("a.norm", "b.norm"), "cuda:sm_90")
    assert row.num_sites == 2
    assert (row.code["registers"], row.code["spills"]) == ("32", "0")
    assert (row.code["loads"], row.code["stores"]) == ("4 x 128", "2 x 128")


@pytest.mark.parametrize(
    ("changes", "pitch"),
    [
        ({}, "8n"),
        ({"strides": (1540, 128, 1)}, "4n"),
        ({"strides": (1537, 128, 1)}, "1n"),
        ({"shape": (1, 4, 128), "strides": (1537, 128, 1)}, "8n"),
        ({"strides": (512, 1, 4)}, "elements apart"),
    ],
)
def test_the_pitch_is_that_of_the_rows(changes, pitch):
    (row,) = code_rows(views("a.norm", norm=replace(NORM, **changes)), "cuda:sm_90")
    assert row.key.pitch == pitch


@pytest.mark.parametrize(
    ("kernel", "target", "reason"),
    [
        ("inductor", "cuda:sm_90", "Inductor generates"),
        ("aiter_rms_norm", "rocm:gfx942", "compiled in its library"),
        ("strided_rms_norm", "rocm:gfx90a", "not compiled for this target; the table has cuda:sm_"),
        ("strided_layer_norm", "cuda:sm_90", ""),
        ("strided_other", "cuda:sm_90", "this size, dtype or pitch is not in the table"),
    ],
)
def test_a_kernel_that_is_not_in_the_table_says_why(kernel, target, reason):
    (row,) = code_rows(views("a.norm", kernel=kernel), target)
    assert row.why_not.startswith(reason)
    assert (row.code is None) == bool(reason)


def test_the_table_of_the_report_is_that_of_the_page():
    page = (ROOT / "docs/kernels.md").read_text()
    rows = machine_code.read_table(page)
    assert len(rows) > 100
    assert TABLE.read_text() == machine_code.to_csv(rows)

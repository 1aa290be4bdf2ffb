"""The HTML report: one file, complete, well formed, and right about layouts and contracts."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from fixpass.cli import main
from fixpass.explanation import explain_with
from fixpass.passes.base import Choice, Remark
from fixpass.passes.remarks import Report
from fixpass.report.html import rows_of, to_html
from fixpass.report.recording import Recorder, Step
from fixpass.report.sites import SiteFacts
from fixpass.testing import bf16

VOID = {"meta", "input", "br", "rect"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps attributes and text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(filter(None, self.texts))


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.RMSNorm(16, dtype=torch.bfloat16)

    def forward(self, qkv):
        return self.q_norm(qkv[:, :64].unflatten(-1, (4, 16)))


def build():
    return Queries(), (bf16(5, 192),)


@pytest.fixture(scope="module")
def page():
    recorder = Recorder()
    model, args = build()
    report = explain_with(model.eval(), args, {}, target="rocm:gfx942", recorder=recorder)
    return Page(to_html(report, recorder))


def test_the_page_is_well_formed_and_loads_nothing(page):
    links = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert links
    assert all(value.startswith("#") for value in links)
    policy = next(value for _, name, value in page.attributes if value and "default-src" in value)
    assert "default-src 'none'" in policy


def test_the_page_says_what_the_report_says(page):
    assert "On rocm:gfx942: 1 of 1 norm reads a strided layout without a copy" in page.text
    assert "test_html.py:" in page.text
    assert "self.q_norm(qkv[:, :64]" in page.text
    assert "a copy would move 1,280 bytes" in page.text


def test_each_kernel_shows_the_constraints_that_hold_and_those_that_do_not(page):
    assert "inductor (chosen) any layout 1,280 bytes in 1 launch" in page.text
    assert "✗ x is dense 2-D" in page.text
    assert "✓" in page.text
    assert "2,560 bytes in 2 launches, copy x, view as rows" in page.text


def test_a_layout_is_drawn_where_the_rows_are(page):
    """q is the first third of each row of 192 elements: four heads of 16, 192 elements apart."""
    starts = [int(value) for tag, name, value in page.attributes if (tag, name) == ("rect", "x")]
    assert starts == [row * 192 + head * 16 for row in range(5) for head in range(4)]
    widths = {value for tag, name, value in page.attributes if (tag, name) == ("rect", "width")}
    assert widths == {"16"}
    assert f"The bar is {(4 * 192 + 64) * 2:,} bytes of memory" in page.text


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((5, 4, 16), (192, 16, 1)), ((4, 5, 16), (16, 192, 1)), ((300, 8), (8, 1)), ((7,), (1,)),
     ((3, 4), (0, 1)), ((2, 3), (1, 2)), ((0, 4), (4, 1)), ((), ())],
)  # fmt: skip
def test_spans_are_the_rows_in_the_order_of_memory(shape, strides):
    found = SiteFacts("n", "", "rms_norm", "", "f32", 4, shape, strides, ()).spans
    last = max(s * (n - 1) for n, s in zip(shape, strides, strict=True)) if shape else 0
    index = torch.as_strided(torch.arange(max(last, 0) + 4096), shape, strides)
    rows = index.reshape(-1, shape[-1]) if shape and index.numel() else index.new_empty(0, 1)
    starts = sorted(set(rows[:, 0].tolist()))[:64]
    assert [start for start, _ in found] == starts


def test_each_changed_graph_stands_beside_the_graph_before(page):
    assert "canonicalize-norms" in page.text
    assert "before after" in page.text
    changed = {value for tag, name, value in page.attributes if (tag, name) == ("tr", "class")}
    assert {"equal", "replace"} <= changed
    assert "the graph stays as it was" in page.text


def test_changes_are_shown_with_the_lines_around_them():
    before = [f"line {i}" for i in range(100)]
    after = [*before[:50], "new", *before[50:]]
    rows, left_out = rows_of(Step("p", "\n".join(before), "\n".join(after), 1.0))
    assert left_out == 0
    assert [(row.kind, row.left, row.right) for row in rows] == [
        ("equal", "line 48", "line 48"),
        ("equal", "line 49", "line 49"),
        ("insert", "", "new"),
        ("equal", "line 50", "line 50"),
        ("equal", "line 51", "line 51"),
    ]


def test_a_norm_that_was_joined_with_another_shows_the_kernel_of_both():
    sites = ("l.q_norm", "l.k_norm")
    chosen = [Remark("s", "applied", w, "", w, choice=Choice("alone", 1)) for w in sites]
    joined = Remark(
        "j", "applied", "n", "one launch", "l.q_norm", choice=Choice("both", -1, sites=sites)
    )
    text = Page(to_html(Report((*chosen, joined)), Recorder())).text
    for site in ("q_norm", "k_norm"):
        assert f"{site} both" in text


def test_text_of_the_model_is_no_markup():
    remark = Remark("p", "missed", "n", "<script>alert(1)</script>", "m['<b>']")
    source = to_html(Report((remark,), "<title>"), Recorder())
    Page(source)
    assert "<script>alert" not in source
    assert "<b>'" not in source


def test_the_command_writes_the_page(tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["explain", f"{__file__}:build", "--html", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"fixpass: writing {path}" in err
    assert "canonicalize-norms" in out
    assert "q_norm" in Page(path.read_text()).text

"""The page of benchmarks says what the JSON of the last runs says."""

import json

from benchmarks import page


def test_the_page_is_that_of_the_results():
    assert page.table() in page.PAGE.read_text(), "run `python -m benchmarks.page`"


def test_a_missed_bound_is_bold(tmp_path, monkeypatch):
    checks = [
        {"claim": "a / b", "measured": 1.234, "bound": 1.0, "at_least": False, "holds": False},
        {"claim": "c / d", "measured": 0.5, "bound": 1.0, "at_least": False, "holds": True},
    ]
    result = {"name": "x", "about": "Ratios. More.", "environment": {"torch": "9"}}
    (tmp_path / "x.json").write_text(json.dumps(result | {"checks": checks}))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.table().splitlines() == [
        "### [x](../benchmarks/results/x.md)",
        "",
        "Ratios. torch 9.",
        "",
        "| what | measured | bound |",
        "|---|---|---|",
        "| a / b | **1.23** | at most 1 |",
        "| c / d | 0.5 | at most 1 |",
    ]

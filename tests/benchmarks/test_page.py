"""The page of benchmarks says what the JSON of the last runs says."""

import json

from benchmarks import page


def test_the_page_is_that_of_the_results():
    assert page.table() in page.PAGE.read_text(), "run `python -m benchmarks.page`"


def test_every_result_with_bounds_has_its_plot():
    named = {
        path.stem for path in page.RESULTS.glob("*.json") if json.loads(path.read_text())["checks"]
    }
    assert {path.stem for path in page.PICTURES.glob("*.svg")} == named


def test_a_plot_names_each_claim(tmp_path):
    checks = [
        {"claim": "a / b", "measured": 1.2, "bound": 1.0, "at_least": False, "holds": False},
        {"claim": "c more", "measured": 0.0, "bound": 0.3, "at_least": False, "holds": True},
        {"claim": "gain", "measured": 9.0, "bound": 3.0, "at_least": True, "holds": True},
    ]
    page.plot(checks, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert all(f">{check['claim']}</text>" in text for check in checks)
    assert [page._distance(check) for check in checks] == [1 / 1.2, page._MOST, 3.0]


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
        "![Measured figures and their bounds](images/benchmarks/x.svg)",
        "",
        "| what | measured | bound |",
        "| --- | --- | --- |",
        "| a / b | **1.23** | at most 1 |",
        "| c / d | 0.5 | at most 1 |",
    ]

"""The versions of torch that fixpass supports: their constraints, and the table of runs."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fixpass.runtime.versions import NEWEST, OLDEST, torch_version
from helpers.versions_page import (
    END,
    HEAD,
    ROOT,
    START,
    Outcome,
    constraints,
    page,
    row,
    versions,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
JUNIT = """<testsuites><testsuite time="1800.0" tests="4">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_four"><error/></testcase>
</testsuite></testsuites>"""


def test_each_supported_version_has_constraints():
    pinned = [constraints(version)["torch"] for version in versions()]
    pinned.append(re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1])
    assert sorted(map(torch_version, pinned)) == [
        (OLDEST[0], minor) for minor in range(OLDEST[1], NEWEST[1] + 1)
    ]


@pytest.mark.parametrize("version", versions())
def test_the_packages_that_move_with_torch_are_allowed(version):
    pins = constraints(version)
    for name in ("torch", "triton"):
        assert pins[name] in NEEDS[name].specifier
    assert ".".join(map(str, torch_version(pins["torch"]))) == version
    assert {"numpy", "pytest", "transformers"} < set(pins)


def test_a_triton_that_no_supported_torch_asks_for_is_not_taken():
    assert "3.9.0" not in NEEDS["triton"].specifier


def test_a_run_becomes_a_row(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    outcome = Outcome.of(Path(tmp_path / "junit.xml"))
    assert outcome.failed == ("tests.test_a::test_two", "tests.test_a::test_four")
    assert row("2.11", outcome, "abc") == (
        "| 2.11.0 | 3.6.0 | 5.17.0 | 3.11 | abc | 1 | 2 | 1 | 30 min |"
    )
    assert str(outcome) == "1 passed, 2 failed, 1 skipped in 30 min"


def test_the_page_gets_one_version_anew_and_keeps_the_others():
    text = f"above\n{START}\nempty\n{END}\nbelow\n"
    for version, line, failed in (
        ("2.14", "| 2.14.1 | old |", ["a::b", "c::d"]),
        ("2.11", "| 2.11.0 | new |", []),
        ("2.14", "| 2.14.1 | new |", ["c::d"]),
    ):
        text = page(text, version, line, failed)
    rows = "| 2.11.0 | new |\n| 2.14.1 | new |"
    assert text == (f"above\n{START}\n\n{HEAD}\n{rows}\n\n- torch 2.14: `c::d`\n{END}\nbelow\n")

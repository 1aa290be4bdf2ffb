"""`python -m fixpass bisect`: the wrong change is named, and a script shows the fault."""

import subprocess
import sys

import pytest

from fixpass.cli import main

MODEL = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from fixpass import Pass

aten = torch.ops.aten


def sines(x):
    x.add_(1.0)
    for _ in range(4):
        x = (x.sin() * 1.5).clamp(max=1000.0)
    return x


def waves():
    return sines, (torch.full((4, 4), 0.5),)


def doubled(x):
    for _ in range(4):
        x = (x * 1.5).clamp(max=1000.0)
    return x


def large():
    return doubled, (torch.full((4, 4), 500.0),)


@dataclass(frozen=True)
class Shifts(Pass):
    name: ClassVar[str] = "shifts"

    def run(self, graph, result):
        for i, node in enumerate(graph.find_nodes(op="call_function", target=aten.sin.default)):
            if not result.take_fuel():
                return
            if i == 2:
                node.target = aten.tanh.default
            result.applied(node, f"site {i}")


@dataclass(frozen=True)
class Clamps(Pass):
    "Is wrong for numbers that random inputs do not reach."

    name: ClassVar[str] = "clamps"

    def run(self, graph, result):
        nodes = graph.find_nodes(op="call_function", target=aten.clamp_max.default)
        for i, node in enumerate(nodes):
            if not result.take_fuel():
                return
            if i == 2:
                node.update_arg(1, 100.0)
            result.applied(node, f"site {i}")
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    words = [sys.executable, "-W", "ignore", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def test_a_pass_that_changes_a_value_is_named_and_a_script_shows_it(home, capsys):
    model = str(home / "model.py")
    words = ["bisect", f"{model}:waves", "--passes", f"{model}:Shifts", "--script", "fault.py"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "shifts changed a value: result 0 differs by" in said
    assert "the first wrong change is 3 of 4 (sin_2: site 2)" in said
    assert said.endswith("python fault.py shows the fault\n")
    shown = run("fault.py")
    assert shown.returncode == 1
    assert shown.stdout.startswith("FAIL pass shifts: shifts changed a value")


@pytest.mark.full
def test_real_inputs_show_a_fault_that_random_ones_do_not(home, capsys):
    model = str(home / "model.py")
    words = ["bisect", f"{model}:large", "--passes", f"{model}:Clamps", "--script", "fault.py"]
    assert main(words) == 1
    assert "the first wrong change is number 3, of clamps (clamp_max_2: site 2)" in (
        capsys.readouterr().out
    )
    shown = [run("fault.py"), run("fault.py", "--without")]
    assert [done.returncode for done in shown] == [1, 0]
    assert shown[1].stdout == "PASS\n"


@pytest.mark.full
def test_a_right_model_has_no_fault(home, capsys):
    assert main(["bisect", f"{home / 'model.py'}:waves"]) == 0
    assert "computes the same values" in capsys.readouterr().out
    assert not list(home.glob("fixpass_fault.py"))

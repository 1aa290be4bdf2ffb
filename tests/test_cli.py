"""The command line, from any folder: models in files, lists, exit statuses, closed pipes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.cli import main
from fixpass.model_loading import load_function
from fixpass.runtime.errors import ConfigError
from fixpass.testing import bf16
from helpers.processes import run_python

FIXPASS = ("-P", "-m", "fixpass")
MODEL = """
import torch
from torch import nn
from sizes import HEADS

class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, dtype=torch.bfloat16)

    def forward(self, qkv):
        return scaled(self.norm(qkv[:, :64].unflatten(-1, (HEADS, 16))))

def scaled(x):
    return x * len(HISTORY)

HISTORY = [1, 2]

def build():
    return Queries(), (torch.randn(5, 192).to(torch.bfloat16),)

def alone():
    return Queries()

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, dtype=torch.bfloat16)

def model():
    return Norm()

def processed():
    return Norm(), lambda model: None
"""


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, dtype=torch.bfloat16)

    def forward(self, x, scale):
        return self.norm(x) * scale


def build():
    return Norm(), (bf16(5, 16),), {"scale": 2.0}


@pytest.mark.parametrize(
    ("name", "place", "folder"),
    [
        ("model.py", "{home}/model.py", "elsewhere"),
        ("my-model.v2.py", "../home/my-model.v2.py", "elsewhere"),
        ("json.py", "json.py", "home"),
    ],
)
def test_a_model_of_a_file_is_explained_from_any_folder(name, place, folder, tmp_path):
    """Dynamo looks up the module of a class, and of a function that reads globals, by name."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (home / name).write_text(MODEL)
    (home / "sizes.py").write_text("HEADS = 4")
    words = "explain", f"{place.format(home=home)}:build", "--target", "rocm:gfx942"
    report = run_python(*FIXPASS, *words, cwd=tmp_path / folder)
    assert f"(norm) at {name}:12: became rms_norm of bf16[5, 4, 16][192, 16, 1]" in report


def test_a_function_may_give_keyword_arguments_and_the_report_may_be_json(capsys):
    assert main(["explain", f"{__file__}:build"]) == 0
    assert "inductor reads bf16[5, 16]" in capsys.readouterr().out
    assert main(["explain", f"{__file__}:build", "--json"]) == 0
    assert '"pass_name": "canonicalize-norms"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "say FILE.py:FUNCTION or MODULE:FUNCTION"),
        ("nowhere.py:build", "there is no file .*nowhere.py"),
        ("nowhere.inside:build", "there is no module 'nowhere' on sys.path"),
        ("fixpass.nowhere:build", "there is no module 'fixpass.nowhere' on sys.path"),
        (f"{__file__}:nothing", "has no function 'nothing'"),
        (f"{__file__}:MODEL", "has no function 'MODEL'"),
    ],
)
def test_a_model_that_cannot_be_found_is_said_on_one_line(name, message, capsys):
    with pytest.raises(ConfigError, match=message):
        load_function(name)
    assert main(["explain", name]) == 2
    assert capsys.readouterr().err.startswith("fixpass: ")


def test_a_function_that_gives_no_arguments_is_said_on_one_line(tmp_path, capsys):
    (tmp_path / "sizes.py").write_text("HEADS = 4")
    (tmp_path / "model.py").write_text(MODEL)
    assert main(["explain", f"{tmp_path}/model.py:alone"]) == 2
    assert "model.py:alone has to return (model, args)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("passes", "insert-relayout"),
        ("kernels", "aiter_add_rms_norm          add_rms_norm    aiter"),
        ("doctor", f"{torch.__version__} with fixpass"),
    ],
)
def test_passes_kernels_and_doctor_list_what_there_is(command, expected, capsys):
    assert main([command]) == 0
    assert expected in capsys.readouterr().out


def test_constraints_are_listed_in_full_only(capsys):
    assert main(["kernels"]) == 0
    short = capsys.readouterr().out
    assert main(["kernels", "--full"]) == 0
    full = capsys.readouterr().out
    constraint = "x is dense 2-D"
    assert constraint in full
    assert f"    {constraint}\n" not in short


def test_targets_list_their_kernels_the_preferred_one_first(capsys):
    assert main(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["cpu", "inductor"]
    assert any(line.startswith("rocm:gfx942, rocm:gfx950  ") for line in lines)
    assert any(" aiter_rms_norm, aiter_layer_norm, aiter_add_rms_norm, " in line for line in lines)
    assert main(["targets", "--full"]) == 0
    out = capsys.readouterr().out
    assert "rocm:gfx942, rocm:gfx950 " in out
    assert "aiter_rms_norm          rms_norm        x is 2-D" in out


COMMANDS = ("explain", "check", "diff", "audit", "bisect", "passes", "targets", "kernels", "doctor")


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the files that the examples of `--help` name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes.py").write_text("HEADS = 4")
    (tmp_path / "model.py").write_text(MODEL)
    save_file({"norm.weight": torch.ones(16, dtype=torch.bfloat16)}, "model.safetensors")


def example_of(capsys, *words):
    """The words of the example at the end of a help text."""
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    return text.partition("example: python -m fixpass ")[2].split()


@pytest.mark.parametrize(
    "command",
    # Bisection compiles the model with Inductor.
    [pytest.param(c, marks=pytest.mark.full if c == "bisect" else ()) for c in COMMANDS],
)
def test_the_example_of_the_help_runs_and_may_print_json(command, examples, capsys):
    words = example_of(capsys, command)
    assert words[0] == command
    if "--json" not in words:
        assert main(words) == 0
        assert capsys.readouterr().out
        words = [word for word in words if word != "--full"] + ["--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)


def test_every_command_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", ["kernels", "passes"])
def test_a_closed_pipe_ends_a_command_without_a_word(command):
    with subprocess.Popen(
        [sys.executable, *FIXPASS, command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 0

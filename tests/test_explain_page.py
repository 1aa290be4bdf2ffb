"""docs/explain.md: each command on the page runs, and each option of `explain` is on it."""

import re
import shlex
from pathlib import Path

import pytest

from fixpass.cli import main
from fixpass.config import pass_names

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/explain.md").read_text()
COMMANDS = re.findall(r"^    python -m fixpass (.+)$", PAGE, re.MULTILINE)
# The words that show that a command printed what the page says about it.
SHOWS = {
    "--diff": "canonicalize-norms (inference graph, ",
    "--json": '"',
    "--full": "x is dense 2-D",
    "doctor": "C++ compiler",
    "passes": pass_names()[0],
    "targets": "rocm:gfx942",
    "kernels": "strided_qk_norm",
    "explain": "canonicalize-norms\n",
}


def test_the_page_has_commands():
    assert len(COMMANDS) > 10


def param(command):
    """Commands that build a model of transformers wait for `make test-full`."""
    is_slow = command.startswith("explain hf:")
    return pytest.param(command, marks=pytest.mark.full if is_slow else ())


@pytest.mark.parametrize("command", map(param, COMMANDS))
def test_a_command_of_the_page_prints_what_it_is_about(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("report.html", str(tmp_path / "report.html")))
    assert main(words) == 0
    expected = next(text for word, text in SHOWS.items() if word in words)
    if "--pass" in words:
        expected = words[words.index("--pass") + 1]
    assert expected in capsys.readouterr().out


def test_every_option_of_explain_is_on_the_page(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    options = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert {option for option in options if option not in PAGE} == set()

"""Tables and progress: rich in a terminal, plain text in a pipe, Markdown in files."""

import json

import pytest

from fixpass.report.tables import TextTable, progress, show_records

RECORDS = [
    {"part": "torch", "state": "works", "found": ["2.13", "with x"], "to do": ""},
    {"part": "g++ [1]", "state": "does not work", "found": "a|b", "to do": ""},
]


@pytest.fixture
def terminal(monkeypatch):
    """FORCE_COLOR makes rich write as to a terminal of 40 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def test_a_pipe_gets_whole_lines_without_spaces_at_their_ends(capsys):
    show_records(RECORDS, title="parts")
    assert capsys.readouterr().out.splitlines() == [
        "parts",
        "part     state          found",
        "torch    works          2.13",
        "                        with x",
        "g++ [1]  does not work  a|b",
    ]
    TextTable(("a",), (("x" * 500,),)).show()
    assert "x" * 500 in capsys.readouterr().out


def test_a_terminal_gets_colours_and_its_width(terminal, capsys):
    show_records(RECORDS)
    out = capsys.readouterr().out
    assert "\x1b[32mworks" in out
    assert "\x1b[31mdoes not work" in out
    TextTable(("a",), (("x" * 500,),)).show()
    assert "x" * 41 not in capsys.readouterr().out


def test_no_color_takes_the_colours_away(terminal, capsys):
    terminal.setenv("NO_COLOR", "1")
    show_records(RECORDS)
    out = capsys.readouterr().out
    assert "works" in out
    assert "\x1b[3" not in out


def test_markdown_has_one_line_a_row():
    assert TextTable.of(RECORDS).markdown().splitlines() == [
        "| part | state | found |",
        "| --- | --- | --- |",
        "| torch | works | 2.13; with x |",
        "| g++ [1] | does not work | a/b |",
    ]


def test_json_has_every_entry(capsys):
    show_records(RECORDS, as_json=True)
    assert json.loads(capsys.readouterr().out) == RECORDS


def test_progress_is_a_line_a_step_in_a_pipe(capsys):
    with progress() as say:
        say("one")
        say("two")
    assert capsys.readouterr().err == "fixpass: one\nfixpass: two\n"


def test_progress_in_a_terminal_has_a_clock(terminal, capsys):
    with progress() as say:
        say("one [1]")
    err = capsys.readouterr().err
    assert "one [1]" in err
    assert "0:00:00" in err

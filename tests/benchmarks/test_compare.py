"""`python -m benchmarks`: two results are compared row by row, and printed as tables or JSON."""

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.compare import verdicts
from benchmarks.gpu import command
from benchmarks.results import Check, Result, spread

OLD = [9.0, 10.0, 10.0, 11.0]


def result(*rows, name="guards"):
    """The facts of a result; a row is (op, milliseconds, ratio to ours)."""
    made = Result(name, "Numbers.")
    for op, times, ratio in rows:
        made.rows.append({"op": op, "ms": spread(times), "other / fixpass": spread(ratio)})
    return made.facts()


@pytest.mark.parametrize(
    ("times", "ratio", "verdict", "changed"),
    [
        (OLD, OLD, "within the spread", []),
        ([10.5, 11.0, 12.0, 13.0], OLD, "within the spread", []),
        ([4.0, 5.0, 5.0, 6.0], OLD, "better", ["ms"]),
        ([14.0, 15.0, 15.0, 16.0], OLD, "worse", ["ms"]),
        (OLD, [4.0, 5.0, 5.0, 6.0], "worse", ["other / fixpass"]),
        (OLD, [14.0, 15.0, 15.0, 16.0], "better", ["other / fixpass"]),
        ([4.0, 5.0, 5.0, 6.0], [4.0, 5.0, 5.0, 6.0], "worse", ["other / fixpass", "ms"]),
    ],
)
def test_a_row_has_a_verdict(times, ratio, verdict, changed):
    (found,) = verdicts(result(("norm", OLD, OLD)), result(("norm", times, ratio)))
    assert (found.row, found.verdict) == ("norm", verdict)
    assert [text.partition(":")[0] for text in found.changes] == changed


def test_rows_of_one_result_alone_are_missing_or_new():
    old = result(("norm", OLD, OLD), ("layer", OLD, OLD))
    new = result(("norm", OLD, OLD), ("group", OLD, OLD))
    assert {found.row: found.verdict for found in verdicts(old, new)} == {
        "norm": "within the spread", "layer": "missing", "group": "new",
    }  # fmt: skip


def test_every_committed_result_is_within_its_own_spread():
    for path in benchmarks.RESULTS.glob("*.json"):
        facts = json.loads(path.read_text())
        found = verdicts(facts, facts)
        assert {verdict.verdict for verdict in found} == {"within the spread"}
        assert len({verdict.row for verdict in found}) == len(facts["rows"]), path.name


@pytest.fixture
def files(tmp_path):
    """An old and a new result, whose only row is worse."""
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, times in zip(paths, (OLD, [30.0, 31.0, 32.0, 33.0]), strict=True):
        path.write_text(json.dumps(result(("norm", times, OLD))))
    return paths


def test_the_command_compares_two_files(files, capsys):
    words = ["--compare", str(files[0]), "--with", str(files[1])]
    assert benchmarks.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "guards, old -> new"
    assert lines[2].split()[:3] == ["norm", "worse", "ms:"]
    assert benchmarks.main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "worse"


def test_the_command_runs_the_benchmark_of_a_file(files, monkeypatch, capsys):
    def run(quick):
        made = Result("guards", "Numbers.", checks=[Check("a bound", 1.0, 2.0)], quick=quick)
        made.rows.append({"op": "norm", "ms": spread(OLD), "other / fixpass": spread(OLD)})
        return made

    monkeypatch.setitem(benchmarks.BENCHMARKS, "guards", run)
    assert benchmarks.main(["--compare", str(files[0])]) == 0
    out, err = capsys.readouterr()
    assert "within the spread" in out
    assert err == "benchmarks: guards\n"
    assert benchmarks.main(["guards", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert err == "benchmarks: 1 of 1: guards\n"
    assert [line.split()[0] for line in out.splitlines() if line][1:5] == [
        "op", "norm", "bound", "holds",
    ]  # fmt: skip
    assert benchmarks.main(["guards", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "guards"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["guards", "--compare", "nowhere.json"], "takes the benchmark's name from OLD.json"),
        (["nothing"], "unknown benchmark 'nothing'; known: matching"),
    ],
)
def test_a_wrong_word_is_an_error(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["gpu"], ["machine_code"]], ids=" ".join)
def test_every_help_text_has_an_example(words, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    example = text.partition("example: python -m benchmarks ")[2].split()
    assert example[: len(words)] == words
    known = {*benchmarks.NAMES, *command.PARTS, "cpu", "cuda:sm_90"}
    assert {word for word in example if not word.startswith("--")} <= known

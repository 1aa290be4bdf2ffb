"""The decode benchmark: an interrupted run goes on where it stopped, and every bound is held."""

import pytest

from benchmarks import decode
from benchmarks.decode_worker import WAYS, Case


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The cases that were measured; each takes fixpass half of the others' time."""
    cases = []

    def measure(case, jobs, rounds):
        if len(cases) == 5:
            cases.append(None)
            raise KeyboardInterrupt
        cases.append(case)
        taken = {way: [0.5 if way == "fixpass" else 1.0] * rounds for way in WAYS}
        return {str(job): taken for job in jobs} | {"memory": {way: [2.0**30] for way in WAYS}}

    monkeypatch.setattr(decode, "_measure", measure)
    monkeypatch.setattr(decode, "FINISHED", tmp_path / "build/cases.jsonl")
    return cases


def test_a_run_after_an_interrupted_one_measures_what_is_left(measured, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        decode.run(quick=False)
    result = decode.run(quick=False)
    cases = [case for case in measured if case]
    assert len(cases) == len(set(cases)) == 32
    assert not decode.FINISHED.exists()
    rows = {(row["model"], row["job"], row["way"]) for row in result.rows}
    assert len(rows) == 32 * len(decode.JOBS) * len(WAYS)
    # Five ratios to Inductor, two to freezing, one of memory.
    assert len(result.checks) == 32 * 8
    assert all(check.holds for check in result.checks)
    result.write(tmp_path)
    assert "static cache, batch 16" in (tmp_path / "decode.svg").read_text()


def test_a_quick_run_keeps_nothing(measured):
    decode.run(quick=True)
    assert measured == [Case("Qwen3", 1024, "float32", 1), Case("Qwen3", 1024, "bfloat16", 2)]
    assert not decode.FINISHED.exists()

"""The GPU checks, on the CPU: parts, limits, JSON, and what is reported where there is no GPU."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import command, kernels
from benchmarks.gpu.part import FAILED, OK, SLOW, WRONG, Part
from fixpass.runtime.kernels import rms_norm
from fixpass.testing.kernel_memory.on_device import launcher_on

HELPERS = Path(__file__).parents[1]


def run_parts(monkeypatch, out, *names, seconds=60.0):
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    parts = {name: (f"helpers.gpu_parts:{name}", 1.0) for name in names}
    status = command.run_parts(parts, "cpu", seconds, out)
    return status, json.loads((out / "gpu.json").read_text())


def test_a_part_that_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path, capfd):
    names = ("dies", "raises", "gives_wrong_values", "is_slow", "works")
    status, total = run_parts(monkeypatch, tmp_path, *names, seconds=200)
    assert status == 1
    assert {name: part["status"] for name, part in total["parts"].items()} == {
        "dies": FAILED, "raises": FAILED, "gives_wrong_values": WRONG, "is_slow": SLOW, "works": OK,
    }  # fmt: skip
    dies, raises = total["parts"]["dies"], total["parts"]["raises"]
    assert dies["errors"][-1]["error"] == "its process died with exit status 7"
    assert [row["what"] for row in dies["rows"]] == ["a row before it dies"]
    assert [error["error"] for error in raises["errors"]] == [
        "ZeroDivisionError: caught",
        "ValueError: not caught",
    ]
    printed = capfd.readouterr().out
    assert "gives_wrong_values: wrong values" in printed
    assert "wrong: bad" in printed
    assert "missed: ours / theirs" in printed
    assert 'raise ValueError("not caught")' in printed


def test_a_part_that_hangs_ends_at_its_limit_and_keeps_its_rows(monkeypatch, tmp_path):
    started = time.monotonic()
    status, total = run_parts(monkeypatch, tmp_path, "hangs", seconds=12)
    assert status == 1
    assert time.monotonic() - started < 30
    part = total["parts"]["hangs"]
    assert part["status"] == FAILED
    assert part["errors"][-1]["error"] == "ended at its limit of 12 s"
    assert [row["what"] for row in part["rows"]] == ["a row before it hangs"]


def assert_total(total, names):
    assert set(total) == {"device", "date", "commit", "versions", "parts"}
    assert total["device"] == "cpu"
    assert total["versions"]["torch"] == torch.__version__
    assert list(total["parts"]) == names
    for part in total["parts"].values():
        assert set(part) >= {"status", "seconds", "rows", "checks", "errors"}
        assert part["errors"] == []
        assert part["rows"]
        assert part["checks"] == [], "the CPU's times are held to no bound"
        assert part["status"] == OK


def dry_run(tmp_path, *names):
    chosen = [argument for name in names for argument in ("--only", name)]
    out = ["--out", str(tmp_path)]
    assert command.main(["--device", "cpu", "--minutes", "9", *chosen, *out]) == 0
    assert_total(json.loads((tmp_path / "gpu.json").read_text()), list(names))
    for name in names:
        assert json.loads((tmp_path / f"{name}.json").read_text())["part"] == name


def test_the_kernels_part_runs_on_the_cpu(tmp_path):
    dry_run(tmp_path, "kernels")


@pytest.mark.inductor
@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in command.PARTS if name != "kernels"])
def test_each_other_part_runs_on_the_cpu(tmp_path, name):
    dry_run(tmp_path, name)


def test_a_wrong_kernel_makes_the_kernels_part_fail(monkeypatch, tmp_path):
    plan = rms_norm.plan_norm

    def with_larger_eps(rows, weight, bias, eps, *rest, **more):
        return plan(rows, weight, bias, eps + 0.1, *rest, **more)

    monkeypatch.setattr(rms_norm, "plan_norm", with_larger_eps)
    for launches in (rms_norm.LAUNCHES, rms_norm.LAYER_LAUNCHES):
        monkeypatch.setattr(launches, "replays", {})
    part = Part("kernels", "cpu", 100.0, tmp_path / "kernels.json")
    kernels.run(part)
    assert part.status() == WRONG
    (row,) = [row for row in part.rows if not row["correct"]]
    assert row["wrong"] > 0
    assert "steps beyond float32 noise" in row["examples"][0]


def test_stores_outside_of_the_outputs_are_faults_on_a_device():
    def next_row_too(x, *, out):
        out.copy_(x)
        x.as_strided((1,), (1,), x.storage_offset() + 5).fill_(3)

    flat = torch.zeros(12)
    x, out = flat[:4], flat[8:]
    x.fill_(2.0)
    report = launcher_on("cpu")(next_row_too, x, out=out)
    assert out.tolist() == [2.0] * 4, "the views still share their storage"
    (fault,) = report.faults
    assert fault.kind == "in storage, outside every view"
    assert launcher_on("cpu")(lambda x, *, out: out.copy_(x), x, out=out).faults == ()


def test_a_device_has_a_short_name():
    assert command.slug("NVIDIA H100 80GB HBM3") == "h100"
    assert command.slug("NVIDIA H200") == "h200"
    assert command.slug("AMD Instinct MI300X") == "mi300x"
    assert command.slug("NVIDIA A100-SXM4-40GB") == "a100"


def test_the_status_line_follows_the_results_that_exist(tmp_path):
    assert command.status_line(tmp_path) == "fixpass has not yet run on a GPU."
    (tmp_path / "h100").mkdir()
    total = {"device": "NVIDIA H100", "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}
    parts = {"compile": {"status": OK}, "kernels": {"status": WRONG}}
    (tmp_path / "h100" / "gpu.json").write_text(json.dumps({**total, "parts": parts}))
    assert command.status_line(tmp_path) == (
        "fixpass has run on a GPU: NVIDIA H100, 2026-01-02, commit abc: 1 of 2 parts ok."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert command.main([]) == 1
    assert "No CUDA or ROCm device is here" in capsys.readouterr().out


def test_the_docs_say_what_the_results_say():
    docs = (command.ROOT / "docs" / "gpu.md").read_text()
    assert command.status_line() in docs

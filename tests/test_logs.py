"""The report in PyTorch's own logs: TORCH_LOGS on stderr, TORCH_TRACE for tlparse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# pip puts it beside Python.
TLPARSE = Path(sys.executable).with_name("tlparse")
PROGRAM = """
import torch
from torch import nn

class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.RMSNorm(16)

    def forward(self, qkv):
        return self.q_norm(qkv[:, :64].unflatten(-1, (4, 16)))

with torch.no_grad():
    run = torch.compile(Queries(), backend="fixpass", options={"lower": "eager"})
    run(torch.randn(5, 192))
"""
REMARK = "applied rms_norm (q_norm) at model.py:11: became rms_norm of f32[5, 4, 16][192, 16, 1]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the trace, and stderr, of a process that compiles a norm."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "model.py").write_text(PROGRAM)
    settings = {"TORCH_LOGS": "+fixpass", "TORCH_TRACE": str(folder / "trace")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", folder / "model.py"],
        capture_output=True,
        text=True,
        env=os.environ | settings,
        check=True,
    )
    return folder / "trace", done.stderr


def artifacts(folder):
    """The payloads of our artefacts; each line of a payload is indented by a tab."""
    (log,) = folder.iterdir()
    payload, name = [], ""
    for line in [*log.read_text().splitlines(), "end"]:
        if line.startswith("\t"):
            payload.append(line[1:])
            continue
        if name == "fixpass_report":
            yield "\n".join(payload)
        facts = json.loads(line[line.index("{") :]) if "{" in line else {}
        payload, name = [], facts.get("artifact", {}).get("name")


def test_torch_logs_print_the_report(run):
    assert "canonicalize-norms" in run[1]
    assert "applied rms_norm (q_norm): became rms_norm" in run[1]


def test_the_trace_holds_the_report_with_the_lines_of_the_model(run):
    (report,) = artifacts(run[0])
    assert REMARK in report


@pytest.mark.skipif(not TLPARSE.exists(), reason="needs tlparse: pip install tlparse")
def test_tlparse_shows_the_report(run, tmp_path):
    (log,) = run[0].iterdir()
    words = [str(TLPARSE), str(log), "-o", str(tmp_path / "page"), "--no-browser"]
    subprocess.run(words, check=True, capture_output=True)
    (page,) = (tmp_path / "page").rglob("fixpass_report*")
    assert REMARK in page.read_text()
    assert page.name in (tmp_path / "page" / "index.html").read_text()

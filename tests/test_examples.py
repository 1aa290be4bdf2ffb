"""Every example runs, as a program and, where it holds tests, as tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path):
    run = subprocess.run([sys.executable, "-P", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_snapshot_example_passes():
    path = ROOT / "examples" / "snapshot_test.py"
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "3 passed" in run.stdout, run.stdout + run.stderr

"""Every example runs, as a program and, where it holds tests, as tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


# What an example prints that shows that it did what it is about.
SHOWS = {
    "row_parallel.py": (
        "into symmetric memory of group",
        "Stats(one_shot=1, two_shot=0, staged_bytes=0, resident_bytes=4096",
    )
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path):
    with_ranks = ["-m", *TORCHRUN] if "torchrun" in path.read_text() else []
    command = [sys.executable, "-P", *with_ranks, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout
    for text in SHOWS.get(path.name, ()):
        assert text in run.stdout


def test_the_snapshot_example_passes():
    path = ROOT / "examples" / "snapshot_test.py"
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "3 passed" in run.stdout, run.stdout + run.stderr

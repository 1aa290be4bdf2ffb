"""Every example runs as its first lines say: as a program, as tests, or as an installed package."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import fixpass
from examples import packed_qkv
from helpers.models import build
from helpers.processes import run_python

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# How each example is run, and what it prints that shows that it did what it is about.
PROGRAMS = [
    pytest.param(
        ["demo.py", "1"],
        ("strided_rms_norm", "16 greedy tokens are those of eager"),
        marks=pytest.mark.inductor,
        id="demo",
    ),
    pytest.param(
        ["reload_live_model.py"],
        ("version 2, buffered", "each with the weights of one version"),
        id="reload_live_model",
    ),
    pytest.param(
        [*TORCHRUN, "row_parallel.py"],
        (
            "into symmetric memory of group",
            "Stats(one_shot=1, two_shot=0, staged_bytes=0, resident_bytes=4096",
        ),
        marks=pytest.mark.inductor,
        id="row_parallel",
    ),
]


@pytest.mark.parametrize(("words", "shows"), PROGRAMS)
def test_a_program_shows_what_it_is_about(words, shows):
    output = run_python(*words, cwd=EXAMPLES)
    for text in shows:
        assert text in output


def test_the_snapshot_example_passes():
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "snapshot_test.py"]
    assert "3 passed" in run_python(*words, cwd=EXAMPLES)


def test_a_packed_model_computes_what_the_model_does():
    model = build("qwen3").module
    tokens = torch.randint(3, 128, (2, 12))
    with torch.no_grad():
        want = model(tokens).logits
        torch.testing.assert_close(packed_qkv.pack_qkv(model)(tokens).logits, want)


def test_the_packed_model_has_norms_that_only_a_strided_kernel_reads():
    model, args = packed_qkv.build(num_layers=1)
    texts = [remark.text for remark in fixpass.explain(model, *args, target="rocm:gfx942").remarks]
    refused = [text for text in texts if "aiter_rms_norm: x is dense 2-D does not hold" in text]
    assert len(refused) == 2


def installed(name, folder):
    """A folder with the package of an example, as pip installs it."""
    source = folder / "source"
    shutil.copytree(EXAMPLES / name, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
    ]
    run_python(*pip, folder / "site", source, cwd=folder)
    return os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])


def test_an_installed_pass_runs_and_is_listed(tmp_path):
    path = installed("own_pass", tmp_path)
    output = run_python("-m", "own_pass", cwd=tmp_path, PYTHONPATH=path)
    assert "clamp-to-relu\n    applied relu: became relu\n" in output
    assert "missed  clamp_min_1: the minimum is 2, and relu needs 0" in output
    listed = run_python("-m", "fixpass", "passes", cwd=tmp_path, PYTHONPATH=path)
    assert "clamp-to-relu          Clamps at zero become relu." in listed


def test_an_installed_kernel_runs_behind_a_relayout_and_is_listed(tmp_path):
    path = installed("own_kernel", tmp_path)
    output = run_python("-m", "own_kernel", cwd=tmp_path, PYTHONPATH=path)
    assert "own_rms_norm reads f32[5, 4, 64][768, 64, 1]" in output
    listed = run_python("-m", "fixpass", "kernels", cwd=tmp_path, PYTHONPATH=path)
    assert "own_rms_norm computes rms_norm  [own_kernel.py: rows are dense]" in listed


def test_every_example_is_short_and_run_by_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")} | {
        path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")
    }
    source = Path(__file__).read_text()
    assert [name for name in sorted(names) if name not in source] == []
    lengths = {path.name: path.read_text().count("\n") for path in EXAMPLES.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 60} == {}

"""`python -m fixpass doctor`: what works here, and the way out for the rest."""

import json
from pathlib import Path

import pytest
import torch

from fixpass.cli import main
from fixpass.config import faulty_variables, set_variables
from fixpass.installation import findings
from fixpass.lowering.contract_table import KERNELS
from fixpass.lowering.target import FALLBACK
from helpers.processes import run_python

DOCTOR = ("-P", "-m", "fixpass", "doctor", "--json")


def found(**environ):
    """The findings by name, made in a process of its own: other tests make kernels known."""
    listed = json.loads(run_python(*DOCTOR, **environ))
    return {finding["name"]: finding for finding in listed}


@pytest.fixture(scope="module")
def here():
    return found()


def test_torch_the_compiler_and_the_extension_work_here(here):
    assert here["torch"]["detail"].startswith(torch.__version__)
    for name in ("torch", "C++ compiler", "C++ extension", "cpu"):
        assert here[name]["state"] == "works", here[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="our kernels work on this machine")
def test_our_kernels_do_not_work_without_a_gpu(here):
    assert here["triton"]["state"] == "absent"
    assert "strided_rms_norm" in here["triton"]["way_out"]
    assert "need Triton with a CUDA or ROCm device" in here["triton"]["way_out"]


def test_every_kernel_belongs_to_a_library_that_is_listed(here):
    texts = " ".join(finding["detail"] + finding["way_out"] for finding in here.values())
    assert [kernel.name for kernel in KERNELS if kernel.name not in texts] == []
    assert FALLBACK in here["cpu"]["detail"]


def test_the_size_of_a_cache_is_that_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "kernel.so").write_bytes(bytes(1234))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (inductor,) = (finding for finding in findings() if finding.name == "inductor cache")
    assert inductor.detail == f"1,234 bytes in {tmp_path}"


def test_a_machine_without_a_compiler_has_a_way_out(tmp_path):
    broken = found(CXX=str(tmp_path / "nothing"), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert broken["C++ extension"]["state"] == "broken"
    assert "install a C++ compiler" in broken["C++ extension"]["way_out"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_shared_memory_has_its_size(here):
    assert " free of " in here["/dev/shm"]["detail"]


def test_variables_are_listed_and_unknown_ones_have_near_names():
    environ = {
        "FIXPASS_STRCT": "1",
        "FIXPASS_FUEL": "many",
        "FIXPASS_LOWER": "eager",
        "FIXPASS": "2",
        "FIXPASS_TEST_FULL": "1",
        "HOME": "/",
    }
    assert list(set_variables(environ)) == [
        "FIXPASS",
        "FIXPASS_FUEL",
        "FIXPASS_LOWER",
        "FIXPASS_STRCT",
    ]
    faults = faulty_variables(environ)
    assert list(faults) == ["FIXPASS", "FIXPASS_FUEL", "FIXPASS_STRCT"]
    assert "near names: FIXPASS_STRICT" in faults["FIXPASS_STRCT"]


def test_the_text_has_what_works_and_what_does_not(monkeypatch, capsys):
    monkeypatch.setenv("FIXPASS_STRCT", "1")
    assert main(["doctor"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["part", "state", "found", "what", "to", "do"]
    assert lines[0].split()[:2] == ["torch", "works"]
    (fault,) = (line for line in lines if line.startswith("FIXPASS_STRCT"))
    assert "does not work" in fault
    assert "unknown variable FIXPASS_STRCT" in fault

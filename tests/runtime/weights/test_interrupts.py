"""Reloads that Ctrl-C hits at random moments, in processes that check each use of memory.

`PYTHONPATH=.:tests python -m helpers.interrupts SEED MODE COUNT` makes one such run by hand.
"""

import os
import subprocess
from pathlib import Path

import pytest

from helpers import interrupts
from helpers.processes import run_python
from helpers.reloading import MODES

SEEDS = 10
RELOADS = 300


def run(seed, mode, count, **environ):
    tests = Path(interrupts.__file__).parents[1]
    path = f"{tests.parent}{os.pathsep}{tests}"
    said = run_python(
        "-P", "-m", "helpers.interrupts", seed, mode, count, PYTHONPATH=path, **environ
    )
    assert f"{mode}, seed {seed}: {count} reloads, " in said
    assert " 0 interrupted" not in said
    assert ", 0 wrong" in said


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_interrupts_leave_one_version_and_a_sound_heap(seed, mode):
    """The C library fills memory as it is freed, and checks its lists of free memory."""
    checks = {"MALLOC_PERTURB_": "165", "MALLOC_CHECK_": "3"}
    run(seed, mode, RELOADS, LD_PRELOAD="libc_malloc_debug.so.0", **checks)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_an_address_sanitizer_finds_no_fault_after_interrupts(tmp_path, mode):
    """Also not in the C++ of fixpass, which is compiled for it."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ -fsanitize=address "$@"\n')
    compiler.chmod(0o755)
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("g++ has no address sanitizer here")
    run(
        0,
        mode,
        RELOADS,
        CXX=str(compiler),
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
    )
    assert list(tmp_path.rglob("tile_copy-*.so"))

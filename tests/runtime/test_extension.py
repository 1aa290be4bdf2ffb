"""The C++ is compiled once a machine, by one process; without a compiler there is one reason."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fixpass.runtime import extension

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
LOAD = "from fixpass.runtime import extension; print(extension.load('tile_copy'))"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes a line into a file at each run, and an empty cache; gives the file."""
    log, wrapper = tmp_path / "runs", tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {shutil.which("c++")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    extension.load.cache_clear()
    yield log
    extension.load.cache_clear()


def start(code=LOAD):
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@needs_compiler
def test_a_second_process_does_not_compile(compiler):
    for _ in range(2):
        process = start()
        output, _ = process.communicate(timeout=120)
        assert "CDLL" in output
        assert len(compiler.read_text().splitlines()) == 1


@needs_compiler
def test_processes_that_ask_at_once_compile_once(compiler):
    processes = [start() for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert ["CDLL" in output for output in outputs] == [True] * 3
    assert len(compiler.read_text().splitlines()) == 1


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "header", "flags", "torch", "processor", "compiler"])
def test_each_part_of_the_key_makes_another_library(compiler, tmp_path, monkeypatch, changed):
    monkeypatch.setattr(extension, "CSRC", tmp_path / "csrc")
    (tmp_path / "csrc/answer").mkdir(parents=True)
    source, header = tmp_path / "csrc/answer.cpp", tmp_path / "csrc/answer/value.h"
    source.write_text('#include "answer/value.h"\nextern "C" int answer() { return VALUE; }\n')
    header.write_text("#define VALUE 1\n")
    assert extension.load("answer").library.answer() == 1
    extension.load.cache_clear()
    if changed == "source":
        source.write_text('extern "C" int answer() { return 2; }\n')
    elif changed == "header":
        header.write_text("#define VALUE 2\n")
    elif changed == "flags":
        monkeypatch.setattr(extension, "FLAGS", (*extension.FLAGS, "-g"))
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "another")
    elif changed == "processor":
        # As after a move of the cache, or of an image with it, to a machine without some sets.
        moved = extension.CPUINFO.read_text().replace(" sse4_2", "").replace(" asimd", "")
        (tmp_path / "cpuinfo").write_text(moved)
        monkeypatch.setattr(extension, "CPUINFO", tmp_path / "cpuinfo")
    else:
        other = shutil.copy(os.environ["CXX"], tmp_path / "another")
        monkeypatch.setenv("CXX", str(other))
    assert extension.load("answer").library.answer() == (
        2 if changed in ("source", "header") else 1
    )
    assert len(compiler.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("source", "compiler_name", "reason"),
    [
        ("int answer() {}", "no-such-compiler", "there is no C++ compiler 'no-such-compiler'"),
        ("int answer() {}", "false", "exited with 1"),
        ("int answer( {}", "c++", "answer.cpp:1:15: error: expected"),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_a_library_that_cannot_be_built_is_one_warning_with_a_reason(
    tmp_path, monkeypatch, source, compiler_name, reason
):
    monkeypatch.setenv("CXX", compiler_name)
    monkeypatch.setattr(extension, "CSRC", tmp_path)
    (tmp_path / "answer.cpp").write_text(source)
    with pytest.warns(UserWarning, match="runs without its C\\+\\+ part 'answer'") as heard:
        found = [extension.load("answer") for _ in range(3)]
    assert len(heard) == 1
    assert found == [found[0]] * 3
    assert found[0].library is None
    assert reason in found[0].reason


@needs_compiler
@pytest.mark.usefixtures("compiler")
def test_a_library_of_another_processor_is_not_loaded_where_no_compiler_is(tmp_path, monkeypatch):
    assert extension.load("tile_copy").library is not None
    extension.load.cache_clear()
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2\n\n")
    monkeypatch.setattr(extension, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="runs without its C"):
        assert extension.load("tile_copy").library is None


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_to_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set TORCH_EXTENSIONS_DIR to a writable folder"):
        found = extension.load("tile_copy")
    assert found.library is None
    assert str(tmp_path / "file") in found.reason


@needs_compiler
def test_a_build_that_was_killed_leaves_nothing_in_the_way(compiler, tmp_path):
    wrapper = tmp_path / "c++"
    whole = wrapper.read_text()
    # The compiler writes a part of its output, then the process that waits for it ends.
    half = 'while [ "$1" != -o ]; do shift; done; echo part > "$2"; kill -9 $PPID\n'
    wrapper.write_text(f"#!/bin/sh\n{half}#{' ' * (len(whole) - len(half) - 12)}\n")
    assert wrapper.stat().st_size == len(whole)
    killed = start()
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    wrapper.write_text(whole)
    output, _ = start().communicate(timeout=120)
    assert "CDLL" in output


def test_every_source_is_shipped():
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    data = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]
    folder = extension.CSRC.parent
    shipped = {path for pattern in data["fixpass.runtime"] for path in folder.glob(pattern)}
    assert shipped == {path for path in extension.CSRC.rglob("*") if path.is_file()}

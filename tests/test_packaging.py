"""What an install holds: every package, the entry point, one tree of files, the pins.

Also what each file keeps to: its length, an opening docstring, no path of anybody's machine.
"""

import ast
import os
import re
import subprocess
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import fixpass
from helpers.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS = ("lowering", "passes", "runtime")
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root|home|tmp/w|opt/pypi|opt/wheels)\b")


def tracked(*patterns):
    """The files that git has or would take; none outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in found.stdout.split("\0") if name]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def test_each_layer_is_a_relative_link_in_the_package():
    assert {name: os.readlink(ROOT / "fixpass" / name) for name in LAYERS} == {
        name: f"../{name}" for name in LAYERS
    }


def test_every_package_is_found():
    """A folder without `__init__.py` imports well in a checkout and is missing from the wheel."""
    options = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    found = set(find_packages(str(ROOT), **options))
    files = [path.relative_to(ROOT) for path in tracked("*.py")]
    inside = [path.parent for path in files if path.parts[0] in ("fixpass", *LAYERS)]
    on_disk = {".".join(part for part in ("fixpass", *path.parts)) for path in inside}
    assert found == {name.replace("fixpass.fixpass", "fixpass") for name in on_disk}


def test_a_checkout_is_imported_whole(tmp_path):
    """With a second checkout first on the path, no module comes from the installed one."""
    for name in ("fixpass", *LAYERS):
        copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore_patterns("__pycache__"))
    code = """if True:
        import sys, fixpass.backend, fixpass.integrations.transformers, fixpass.weights
        named = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "fixpass"}
        print(len(named), sorted(n for n, f in named.items() if not f.startswith(sys.argv[1])))
    """
    count, others = run_python("-c", code, tmp_path, cwd=tmp_path).split(maxsplit=1)
    assert int(count) > 50
    assert others.strip() == "[]"


def test_torch_finds_the_backend():
    (found,) = entry_points(group="torch_dynamo_backends", name="fixpass")
    assert callable(found.load())


def test_the_version_is_one():
    assert fixpass.__version__ == PYPROJECT["project"]["version"] == version("fixpass")


def test_every_direct_dependency_is_pinned():
    project = PYPROJECT["project"]
    direct = [*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    direct += [line for extra in project["optional-dependencies"].values() for line in extra]
    direct += PYPROJECT["build-system"]["requires"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for wanted in map(Requirement, direct):
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted


def test_files_are_short_and_open_with_what_they_do():
    faults = []
    for path in tracked("*.py"):
        source = path.read_text()
        if source.count("\n") > 300:
            faults.append(f"{path.relative_to(ROOT)}: more than 300 lines")
        if ast.get_docstring(ast.parse(source)) is None:
            faults.append(f"{path.relative_to(ROOT)}: no docstring")
    assert not faults, "\n".join(faults)


def test_no_file_names_a_path_of_a_machine():
    faults = [path for path in tracked() if MACHINE_PATH.search(path.read_bytes())]
    assert [path.relative_to(ROOT).as_posix() for path in faults] == []

"""What an install holds: the package list, the entry point, the links for type checkers, the pins.

Also what each file keeps to: its length, an opening docstring, no path of anybody's machine.
"""

import ast
import re
import subprocess
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fixpass

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root|home|tmp/w|opt/pypi|opt/wheels)\b")


def tracked(*patterns):
    """The files that git has or would take; none outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in found.stdout.split("\0") if name]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def test_every_package_is_listed():
    on_disk = set()
    for package, folder in FOLDERS.items():
        for module in (ROOT / folder).rglob("*.py"):
            inner = module.parent.relative_to(ROOT / folder).parts
            on_disk.add(".".join([package, *inner]))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_package_has_an_init():
    folders = {
        module.parent for folder in FOLDERS.values() for module in (ROOT / folder).rglob("*.py")
    }
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_typings_link_every_facade_file_and_layer():
    facade = [path for path in (ROOT / "fixpass").iterdir() if path.suffix == ".py"]
    facade += [path.parent for path in (ROOT / "fixpass").glob("*/__init__.py")]
    facade += [ROOT / "fixpass/py.typed"]
    expected = {path.name: path for path in facade}
    expected |= {layer: ROOT / layer for layer in ("lowering", "passes", "runtime")}
    links = {link.name: link.resolve() for link in (ROOT / "typings/fixpass").iterdir()}
    assert links == expected, "run `make typings`"


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

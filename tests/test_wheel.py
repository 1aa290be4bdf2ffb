"""The wheel, built from the sdist: every module and C++ source as a file, and it works alone."""

import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("passes", "lowering", "runtime")
METADATA = ("pyproject.toml", "README.md", "LICENSE")
# Libraries that an integration needs and that are not installed with fixpass.
ENGINES = {"vllm", "sglang"}
IMPORTS = """
import importlib, pkgutil, fixpass
for found in pkgutil.walk_packages(fixpass.__path__, "fixpass."):
    try:
        print(importlib.import_module(found.name).__file__)
    except ModuleNotFoundError as error:
        print("needs", error.name.partition(".")[0])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, the wheel, and the wheel's files in `site`."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fixpass", *LAYERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in METADATA:
        shutil.copy(ROOT / name, source)
    run_python("-P", "-m", "build", "--no-isolation", "--outdir", folder, source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder


def in_the_tree():
    """Each file of the package as the wheel should name it."""
    roots = {ROOT / "fixpass": "fixpass", **{ROOT / n: f"fixpass/{n}" for n in LAYERS}}
    return {
        f"{name}/{path.relative_to(root).as_posix()}"
        for root, name in roots.items()
        for path in root.rglob("*")
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".c", ".typed", ".html", ".csv")
    }


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}
        links = [i.filename for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
    assert {name for name in names if ".dist-info/" not in name} == in_the_tree()
    assert links == []
    assert any(name.endswith((".cpp", ".c")) for name in names)


def test_the_sdist_holds_no_link(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if member.issym() or member.islnk()] == []


def test_every_module_of_the_wheel_is_imported_from_it(built):
    site = built / "site"
    lines = run_python("-c", IMPORTS, cwd=built, PYTHONPATH=str(site)).splitlines()
    missing = {line.split()[1] for line in lines if line.startswith("needs")}
    files = [line for line in lines if not line.startswith("needs")]
    assert missing <= ENGINES
    assert len(files) > 100
    assert [path for path in files if not path.startswith(str(site))] == []


def test_the_wheel_compiles_and_lists_its_passes(built):
    program = """
import torch, fixpass
norm = torch.nn.RMSNorm(8).eval().requires_grad_(False)
fixpass.compile(norm, lower="eager", strict=True)(torch.randn(2, 8))
print(fixpass.last_reports()[-1], fixpass.__file__)
"""
    site = str(built / "site")
    printed = run_python("-c", program, cwd=built, PYTHONPATH=site)
    assert "became rms_norm" in printed
    assert site in printed
    assert "lower-norms" in run_python("-m", "fixpass", "passes", cwd=built, PYTHONPATH=site)

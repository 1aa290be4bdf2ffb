"""Nothing is built and then forgotten: each pass runs, is tested and is in docs/passes.md.

Each kernel of the contract table is in the README or docs. Passes are found by reading their
source, so one that nothing imports is found too.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from fixpass.lowering.contract_table import KERNELS

ROOT = Path(__file__).resolve().parents[1]
# Where the passes that run are named: the default pipeline, and the backend's entry stage.
LAYERS = ("fixpass", "passes", "lowering", "runtime")
STAGES = [ROOT / "passes/__init__.py", *sorted((ROOT / "fixpass").glob("*.py"))]


def assigned(item):
    """(what, value) of each assignment in a class body, annotated or not."""
    if isinstance(item, ast.Assign):
        return [(ast.unparse(target), item.value) for target in item.targets]
    return [(ast.unparse(item.target), item.value)] if isinstance(item, ast.AnnAssign) else []


def pass_classes(source):
    """(class, name) of each pass that the source defines."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if "Pass" not in {ast.unparse(base).split(".")[-1] for base in node.bases}:
            continue
        body = dict(pair for item in node.body for pair in assigned(item))
        yield node.name, ast.literal_eval(body["name"])


def stem(path):
    """The name of a pass's file, or of its folder."""
    return path.parent.name if path.name == "__init__.py" else path.stem


PASSES = [
    pytest.param(path, *found, id=found[1])
    for path in sorted((ROOT / "passes").rglob("*.py"))
    for found in pass_classes(path.read_text())
]
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def public_modules():
    """(name, path) of each module that is not private; a package by its folder's name."""
    paths = [path.relative_to(ROOT) for path in FILES if not path.is_symlink()]
    return [(stem(path), path.as_posix()) for path in paths if not stem(path).startswith("_")]


def public_classes():
    """(name, path) of each class at the top of a module."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, path.relative_to(ROOT).as_posix()


def several(named):
    """The names that stand for more than one thing, with the places."""
    places = defaultdict(list)
    for name, path in named:
        places[name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def is_facade(paths):
    """Whether the first of two modules is what users import, and only re-exports the second."""
    if len(paths) != 2 or Path(paths[0]).parent.as_posix() != "fixpass":
        return False
    body = ast.parse((ROOT / paths[0]).read_text()).body
    return not any(isinstance(node, ast.ClassDef) for node in body)


def test_no_two_classes_share_a_name():
    assert several(public_classes()) == {}


def test_no_two_modules_share_a_name_but_a_facade_and_its_module():
    found = several(public_modules())
    assert {name: paths for name, paths in found.items() if not is_facade(paths)} == {}


def test_there_are_passes():
    assert PASSES


@pytest.mark.parametrize(("path", "cls", "name"), PASSES)
def test_the_names_of_a_pass_agree(path, cls, name):
    assert name == stem(path).replace("_", "-")
    assert cls == "".join(word.capitalize() for word in name.split("-"))


@pytest.mark.parametrize(("path", "cls", "name"), PASSES)
def test_a_pass_is_one_file_or_one_folder_and_short(path, cls, name):
    assert path.parent.name == "passes" or path.name == "__init__.py"
    assert path.read_text().count("\n") <= 120


@pytest.mark.parametrize(("path", "cls", "name"), PASSES)
def test_a_pass_has_a_row_on_the_page_of_passes(path, cls, name):
    assert f"| `{name}` |" in (ROOT / "docs/passes.md").read_text()


@pytest.mark.parametrize(("path", "cls", "name"), PASSES)
def test_a_pass_has_tests(path, cls, name):
    assert (ROOT / f"tests/passes/test_{stem(path)}.py").is_file()


@pytest.mark.parametrize(("path", "cls", "name"), PASSES)
def test_a_pass_runs_in_a_stage(path, cls, name):
    trees = [ast.parse(stage.read_text()) for stage in STAGES]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert cls in used, "neither in the default pipeline nor in the entry stage"


@pytest.mark.parametrize("kernel", sorted({kernel.name for kernel in KERNELS}))
def test_a_kernel_is_in_the_readme_or_docs(kernel):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert any(f"`{kernel}`" in page.read_text() for page in pages)

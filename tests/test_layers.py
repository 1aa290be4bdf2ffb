"""Who imports whom: fixpass -> passes -> lowering -> runtime -> torch, and triton where kernels are.

The source is read, not run, so an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
from pathlib import Path

import pytest

from helpers.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("runtime", "lowering", "passes", "fixpass")  # each imports itself and those before it
TRITON = ("runtime/kernels/", "benchmarks/machine_code.py", "fixpass/testing/kernel_memory")


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def complaints(path, source):
    layer = path.split("/")[0]
    for name in imports(source):
        top, second = (*name.split("."), "")[:2]
        owner = second if second in LAYERS else "fixpass"
        if top == "":
            yield f"{path} imports {name}: a relative import"
        elif top in LAYERS[:-1]:
            yield f"{path} imports {name}: a second copy of fixpass.{top}"
        elif top == "fixpass" and LAYERS.index(owner) > LAYERS.index(layer):
            yield f"{path} imports {name}: {layer} is below {owner}"
        elif top == "sympy" and layer == "runtime":
            yield f"{path} imports {name}: compiled code must not pull in the compiler"
        elif top == "triton" and not path.startswith(TRITON):
            yield f"{path} imports {name}: triton is for {', '.join(TRITON)}"


def test_no_layer_imports_the_one_above():
    paths = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    named = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    assert [line for path, source in named.items() for line in complaints(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/ops.py", "from fixpass.lowering.layout import Layout"),
        ("runtime/ops.py", "from fixpass import passes"),
        ("runtime/ops.py", "import sympy"),
        ("lowering/layout.py", "def f():\n    import fixpass.passes.base"),
        ("passes/base.py", "from fixpass import Config"),
        ("passes/base.py", "import fixpass"),
        ("passes/base.py", "import triton.language as tl"),
        ("passes/base.py", "from .rewrite import Rewrite"),
        ("fixpass/backend.py", "from lowering import layout"),
    ],
)
def test_a_planted_import_is_found(path, source):
    assert len(list(complaints(path, source))) == 1


def test_the_contract_table_loads_without_triton():
    blocked = "import sys; sys.modules['triton'] = None; import fixpass.lowering.contract_table"
    run_python("-P", "-c", blocked)

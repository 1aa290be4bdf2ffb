"""Cache keys of third parties' passes: every option, every module of source, or no key at all."""

import enum
import importlib
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline

from fixpass import Pass, Pipeline
from fixpass.testing import f32, trace


@dataclass(frozen=True)
class Own(Pass):
    name: ClassVar[str] = "own"
    option: Any = None
    hidden: Any = field(default=None, repr=False)

    def run(self, graph, result):
        pass


@dataclass(frozen=True)
class Derived(Own):
    """An attribute that is no field."""

    def __post_init__(self):
        object.__setattr__(self, "table", torch.full((3000,), float(self.option)))


@dataclass(frozen=True)
class Named(Own):
    def cache_key(self):
        return f"table of {self.option.name}"


class Handle:
    """A resource: it has a name, and no values to hash."""

    def __init__(self, name):
        self.name = name


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def uuid(option=None, cls=Own, **fields):
    return Pipeline((cls(option, **fields),)).uuid()


def table(value, size=3000):
    found = torch.zeros(size)
    found[size // 2] = value
    return found


def scaled_by(factor):
    return lambda x, shift=0: x * factor + shift


PAIRS = {
    "large tensor": lambda i: table(i),
    "small tensor": lambda i: table(i, 3),
    "16-bit tensor": lambda i: table(i).bfloat16(),
    "dtype of a tensor": lambda i: table(0).to((torch.float32, torch.float64)[i]),
    "strides of a tensor": lambda i: torch.zeros(4, 4).t() if i else torch.zeros(4, 4),
    "parameter": lambda i: torch.nn.Parameter(table(i)),
    "tensor in a dict": lambda i: {"tables": [table(0), table(i)]},
    "large array": lambda i: table(i).numpy(),
    "scalar of numpy": lambda i: np.float32(i),
    "closure of a function": lambda i: scaled_by(i),
    "default of a function": lambda i: lambda x, shift=i: x + shift,
    "member of an enumeration": lambda i: list(Color)[i],
    "type of a number": lambda i: (1, 1.0)[i],
    "value of another pass": lambda i: Own(table(i)),
    "set": lambda i: {"a", "b" * (i + 1)},
    "op": lambda i: (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)[i],
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_key_follows_the_value_of_every_option(make):
    assert uuid(make(0)) == uuid(make(0)) is not None
    assert uuid(make(0)) != uuid(make(1))
    assert uuid(hidden=make(0)) == uuid(hidden=make(0)) is not None
    assert uuid(hidden=make(0)) != uuid(hidden=make(1))
    assert uuid(make(0)) != uuid(hidden=make(0))


def test_a_key_follows_an_attribute_that_is_no_field():
    one, two = Derived(1.0), Derived(1.0)
    assert Pipeline((one,)).uuid() == Pipeline((two,)).uuid()
    two.table[7] = 0.0
    assert Pipeline((one,)).uuid() != Pipeline((two,)).uuid()


def test_a_pass_without_a_complete_key_is_not_cached_and_the_report_says_how_to_change_that():
    theirs = Pipeline((Own(hidden=iter(())),))
    assert theirs.uuid() is None
    assert_expected_inline(
        str(theirs.run(trace(torch.sin, f32(3)).graph)),
        """\
own
    missed  graph: not cached, because no key can hold its option hidden holds a tuple_iterator: give the pass a `cache_key` method
""",
    )


@pytest.mark.parametrize(
    "option",
    [
        object(),
        [object()],
        {"a": torch.Generator()},
        torch.empty(3, device="meta"),
        torch.zeros(3).to_sparse(),
        np.array([object()]),
        scaled_by(object()),
    ],
    ids=["object", "list", "dict", "meta", "sparse", "array", "closure"],
)
def test_an_option_without_a_name_means_no_cache(option):
    assert uuid(option) is None
    assert uuid(hidden=option) is None


def test_a_key_of_its_own_names_a_pass_whose_options_have_no_name():
    handles = Handle("one"), Handle("two")
    found = [uuid(handle, Named) for handle in handles]
    assert [uuid(handle) for handle in handles] == [None, None]
    assert None not in found
    assert found[0] != found[1]
    assert found[0] == uuid(Handle("one"), Named)


PASS = """
from dataclasses import dataclass
from typing import ClassVar
from fixpass import Pass
{imports}

@dataclass(frozen=True)
class Theirs({base}):
    name: ClassVar[str] = "theirs"

    def run(self, graph, result):
        {body}
"""
BASE = "from fixpass import Pass\n\nclass Base(Pass):\n    factor = {value}\n"
# The imports of the pass, its base, its body, and the module whose `value` changes.
KINDS = {
    "helper": ("from . import helper", "Pass", "helper.f()", "helper"),
    "constant": ("from .helper import f", "Pass", "f()", "helper"),
    "absolute": ("import PACKAGE.helper as h", "Pass", "h.f()", "helper"),
    "in a function": ("", "Pass", "from .helper import f", "helper"),
    "helper of a helper": ("from . import middle", "Pass", "middle", "helper"),
    "base": ("from .base import Base", "Base", "pass", "base"),
    "package": ("from .sub import g", "Pass", "g()", "sub/__init__"),
    "itself": ("", "Pass", "VALUE", "theirs"),
}


def write(folder, kind, value):
    imports, base, body, changed = KINDS[kind]
    imports = imports.replace("PACKAGE", folder.name)
    values = dict.fromkeys(("helper", "base", "sub/__init__", "theirs"), 0) | {changed: value}
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "middle.py").write_text("def g():\n    from . import helper\n    return helper\n")
    (folder / "helper.py").write_text(f"def f(): return {values['helper']}\n")
    (folder / "base.py").write_text(BASE.format(value=values["base"]))
    (folder / "sub" / "__init__.py").write_text(f"def g(): return {values['sub/__init__']}\n")
    text = PASS.format(imports=imports, base=base, body=body).replace("VALUE", str(value))
    (folder / "theirs.py").write_text(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_follows_the_source_of_every_module_that_a_pass_uses(tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(tmp_path)
    package = f"fixpass_own_{kind.replace(' ', '_')}"
    found = []
    for value in (1, 22, 1):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        write(tmp_path / package, kind, value)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        # Imported, so that an import within a function finds it loaded.
        importlib.import_module(f"{package}.helper")
        found.append(Pipeline((importlib.import_module(f"{package}.theirs").Theirs(),)).uuid())
    assert None not in found
    assert found[0] != found[1]
    assert found[0] == found[2]

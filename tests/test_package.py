"""`import fixpass`: cheap, complete, and every submodule at hand."""

import pytest

import fixpass
from helpers.processes import run_python


def in_a_new_process(code):
    return run_python("-P", "-c", f"import sys, fixpass\n{code}").strip()


def test_importing_the_package_loads_no_torch_and_no_submodule():
    loaded = "[n for n in sys.modules if n == 'torch' or n.startswith('fixpass.')]"
    assert in_a_new_process(f"print({loaded})") == "[]"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("fixpass.weights.load.__name__", "load"),
        ("fixpass.sharding.fully_shard_model.__name__", "fully_shard_model"),
        ("fixpass.testing.trace.__name__", "trace"),
    ],
)
def test_a_submodule_loads_on_first_use(expression, expected):
    assert in_a_new_process(f"print({expression})") == expected


@pytest.mark.parametrize("name", fixpass.__all__)
def test_an_exported_name_is_a_class_or_a_function(name):
    assert callable(getattr(fixpass, name))


def test_explain_stays_a_function_whatever_was_imported_before():
    code = "import fixpass.explanation, fixpass.backend; print(callable(fixpass.explain))"
    assert in_a_new_process(code) == "True"


def test_dir_lists_the_exported_names_and_the_submodules():
    assert {*fixpass.__all__, "weights", "sharding", "testing", "integrations"} <= set(dir(fixpass))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fixpass' has no attribute 'wieghts'"):
        fixpass.wieghts  # noqa: B018

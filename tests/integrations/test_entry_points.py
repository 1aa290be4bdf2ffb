"""Entry points name functions that exist, also those of an install of the release before."""

import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name

import pytest

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
GROUPS = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
FORMER = ("fixpass.integrations.sglang_diffusion:plugin",)


@pytest.mark.parametrize(
    "name", [*(name for group in GROUPS.values() for name in group.values()), *FORMER]
)
def test_an_entry_point_is_a_function(name):
    assert callable(resolve_name(name))


def test_the_worker_class_is_found_under_its_former_name_with_a_warning():
    # Another process, as a module warns only when it is imported first.
    code = "from fixpass.integrations.vllm_worker import Reports; print(Reports.__module__)"
    command = [sys.executable, "-P", "-W", "default::DeprecationWarning", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "fixpass.integrations.vllm.worker"
    assert "name fixpass.integrations.vllm.worker.Reports" in found.stderr


def test_keywords_of_functions_need_none_of_sglangs_hooks():
    code = (
        "import fixpass.modules, sys; "
        "print('fixpass.integrations.sglang.serving' in sys.modules, fixpass.modules.__all__)"
    )
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == (
        "False ['AcceptedKwargs', 'accepted_kwargs', 'find_attr', 'unwrapped']"
    )

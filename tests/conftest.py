"""What every test run sets before torch or fixpass is imported, and resets between tests.

Passes are verified; compiled code is cached in a folder that lives as long as the run, shared
by its workers, so that no run depends on an earlier one; tests marked `full` wait for
FIXPASS_TEST_FULL=1. It holds no helpers: those are in fixpass.testing, where users find them too.
"""

import os
import shutil
import sys
import tempfile

import pytest

os.environ.setdefault("FIXPASS_VERIFY", "1")

# Workers inherit the environment of the process that starts them, and so the folder.
CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="fixpass-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(CACHE, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(CACHE, "triton")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu",
                     help="where kernel tests run kernels; cpu is Triton's interpreter")  # fmt: skip


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def launch(device):
    """Runs a kernel launcher on operands of the CPU and reports its faults."""
    if device == "cpu":
        from fixpass.testing.kernel_memory import trace_memory

        return trace_memory
    from fixpass.testing.kernel_memory.on_device import launcher_on

    return launcher_on(device)


def pytest_unconfigure():
    if CACHE is not None:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if os.environ.get("FIXPASS_TEST_FULL", "0") == "1":
        return
    skipped = [item for item in items if item.get_closest_marker("full")]
    if not skipped:
        return
    config.hook.pytest_deselected(items=skipped)
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    # Only where a test compiled something: this import costs seconds, the reset microseconds.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()

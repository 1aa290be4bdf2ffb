"""Folded graphs around their calls: in another process with a warm cache, and beside an update."""

import json
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fixpass import Pass, weights
from fixpass.runtime.errors import UpdateError
from helpers.processes import run_python
from helpers.weight_updates import compiled

SCRIPT = """
import json
import sys

import torch
from torch._dynamo.utils import counters

import fixpass


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((512, 128), float(sys.argv[1])))

    def forward(self, x):
        return x @ self.weight.t().contiguous()


model = Model()
run = torch.compile(model, backend="fixpass")
with torch.no_grad():
    first = run(torch.ones(1, 128))[0, 0].item()
    model.weight.mul_(2)
    second = run(torch.ones(1, 128))[0, 0].item()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([first, second, hits, len(fixpass.last_reports())]))
"""


@pytest.mark.inductor
def test_a_second_process_with_other_weights_folds_its_own_on_a_warm_cache(tmp_path):
    script = tmp_path / "folded.py"
    script.write_text(SCRIPT)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "FIXPASS_VERIFY": "0"}

    def run(value):
        return json.loads(run_python("-P", script, value, cwd=tmp_path, **cache))

    assert run("1") == [128.0, 256.0, 0, 1]
    assert run("3") == [384.0, 768.0, 1, 1]


class Waiting(nn.Module):
    """Reads a weight before and after an operation that waits."""

    def __init__(self, wait):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(512, 64))
        self.wait = wait

    def forward(self, x):
        first = x @ self.weight.t().contiguous()
        return first, torch.ops.fold_updates_test.wait(x) @ self.weight.t()


@pytest.fixture
def waiting():
    """A module whose compiled call waits, after `entered`, for `released`."""
    entered, released = threading.Event(), threading.Event()
    library = torch.library.Library("fold_updates_test", "FRAGMENT")
    library.define("wait(Tensor x) -> Tensor")

    def wait(x):
        entered.set()
        assert released.wait(30)
        return x.clone()

    library.impl("wait", wait, "CompositeExplicitAutograd")
    torch.library.register_fake("fold_updates_test::wait", torch.empty_like, lib=library)
    yield Waiting(wait), entered, released
    released.set()
    library._destroy()


def test_an_update_waits_for_a_compiled_call_and_no_call_sees_half_of_it(waiting):
    module, entered, released = waiting
    x, outs = torch.ones(1, 64), []
    with torch.no_grad():
        run = compiled(module)
        released.set()
        run(x)
    entered.clear()
    released.clear()

    def call():
        with torch.no_grad():
            outs.append(run(x))

    thread = threading.Thread(target=call)
    thread.start()
    assert entered.wait(30)
    with (
        pytest.raises(UpdateError, match=r"^1 calls of the model did not end within 0\.2 s"),
        weights.update(module, timeout=0.2) as update,
    ):
        update.load("weight", torch.full((512, 64), 2.0))
    assert module.weight[0, 0] == 1.0
    timer = threading.Timer(0.2, released.set)
    timer.start()
    with weights.update(module) as update:
        update.load("weight", torch.full((512, 64), 2.0))
    thread.join(30)
    call()
    timer.join()
    assert [tuple(out[0, 0].item() for out in pair) for pair in outs] == [(64, 64), (128, 128)]


@dataclass(frozen=True)
class NoteStaticInputs(Pass):
    """Writes down which inputs AOTAutograd takes for static."""

    name: ClassVar[str] = "note-static-inputs"
    found: tuple[list[int], ...] = ([],)

    def run(self, graph, result):
        static = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        inputs = graph.find_nodes(op="placeholder")
        self.found[0][:] = [len(inputs), *static]


def test_a_value_that_is_kept_is_a_static_input_which_cuda_graphs_do_not_copy():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(512, 256), requires_grad=False)
            self.b = nn.Parameter(torch.randn(512, 256), requires_grad=False)

        def forward(self, x):
            return x @ torch.cat([self.a, self.b]).t()

    note = NoteStaticInputs()
    options = {"lower": "eager", "passes": (note,), "disable": ("prepack-linears",)}
    torch.compile(Joined(), backend="fixpass", options=options)(torch.randn(4, 256))
    # a, b and their concatenation; x, the third input, is not static.
    assert note.found[0] == [4, 0, 1, 3]

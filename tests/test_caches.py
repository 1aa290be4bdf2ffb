"""Inductor's caches: full hits in a second process, and never a graph of other passes.

`uuid` is what names our passes in both cache keys; each thing that changes what a pass does has
to change it, and nothing else.
"""

import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fixpass import Config, Pass, Pipeline
from fixpass.backend import GraphPass
from fixpass.lowering.target import CPU, target_named
from fixpass.passes import default_passes, pipeline
from fixpass.pipelines import graph_pipeline
from helpers.processes import run_python

THEIRS = """
from dataclasses import dataclass
from typing import ClassVar
from fixpass import Pass

@dataclass(frozen=True)
class Theirs(Pass):
    name: ClassVar[str] = "theirs"

    def run(self, graph, result):
        {body}
"""


@dataclass(frozen=True)
class Own(Pass):
    name: ClassVar[str] = "own"
    factor: float = 1.0

    def run(self, graph, result):
        pass


def uuid(target=CPU, **options):
    return graph_pipeline(Config.resolve(options, {}), target).uuid()


def load(path, body):
    """The pass `Theirs` of a module file with this body."""
    path.write_text(THEIRS.format(body=body))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.Theirs()


def test_a_uuid_is_stable():
    assert uuid() == uuid()
    assert uuid(passes=(Own(2.0),)) == uuid(passes=(Own(2.0),))


def test_options_that_only_check_do_not_change_a_uuid():
    assert uuid(verify=True) == uuid()


def test_all_that_changes_a_graph_changes_a_uuid():
    found = [
        uuid(),
        uuid(fuel=1),
        uuid(disable=("drop-dead-copies",)),
        uuid(target_named("rocm:gfx942")),
        uuid(passes=(Own(),)),
        uuid(passes=(Own(2.0),)),
        uuid(passes=(Own(2.0), Own())),
        uuid(passes=(Own(), Own(2.0))),
    ]
    assert len(set(found)) == len(found)


def test_the_source_of_a_pass_of_a_third_party_is_in_the_uuid(tmp_path):
    one = uuid(passes=(load(tmp_path / "fixpass_theirs_one.py", "pass"),))
    same = uuid(passes=(load(tmp_path / "fixpass_theirs_two.py", "pass"),))
    other = uuid(passes=(load(tmp_path / "fixpass_theirs_three.py", "graph.lint()"),))
    assert one == same
    assert one != other


def test_our_own_source_is_in_the_uuid(tmp_path, monkeypatch):
    kernel = tmp_path / "kernel.py"
    found = []
    for text in ("a = 1", "a = 2"):
        kernel.write_text(text)
        monkeypatch.setattr(pipeline, "source_files", lambda: [kernel])
        pipeline.source_hash.cache_clear()
        found.append(uuid())
    pipeline.source_hash.cache_clear()
    assert found[0] != found[1]


def test_every_source_file_of_the_layers_is_hashed():
    names = {path.name for path in pipeline.source_files()}
    assert {
        "lower_norms.py",
        "scale.py",
        "contract_table.py",
        "norms.py",
        "rms_norm.py",
    } <= names


def test_a_pass_typed_at_a_prompt_has_no_uuid_so_that_nothing_is_cached(monkeypatch):
    prompt = types.ModuleType("fixpass_prompt")
    exec(THEIRS.format(body="pass"), vars(prompt))
    monkeypatch.setitem(sys.modules, "fixpass_prompt", prompt)
    theirs = Pipeline((*default_passes(CPU), prompt.Theirs()))
    assert theirs.uuid() is None
    assert GraphPass(theirs).uuid() is None


def test_a_hook_of_the_user_without_a_uuid_is_not_cached():
    ours = Pipeline(default_passes(CPU))
    assert GraphPass(ours, (lambda graph: None,)).uuid() is None
    assert GraphPass(ours, (GraphPass(ours),)).uuid() != GraphPass(ours).uuid()


SCRIPT = """
import json
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch._dynamo.utils import counters

import fixpass
from fixpass import Pass


@dataclass(frozen=True)
class ScaleResult(Pass):
    name: ClassVar[str] = "scale-result"
    factor: float = 1.0

    def run(self, graph, result):
        output = graph.output_node()
        value = output.args[0][0]
        with graph.inserting_before(output):
            new = graph.call_function(torch.ops.aten.mul.Tensor, (value, self.factor))
        new.meta["val"] = value.meta["val"] * self.factor
        output.args = ((new, *output.args[0][1:]),)


def model(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


x = torch.ones(4, 8)
for options in ({}, {"passes": (ScaleResult(2.0),)}, {"passes": (ScaleResult(3.0),)}):
    torch._dynamo.reset()
    counters.clear()
    before = len(fixpass.last_reports())
    result = torch.compile(model, backend="fixpass", options=options)(x)
    hits = counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]
    reports = [str(report) for report in fixpass.last_reports()[before:]]
    print(json.dumps([round(float(result[0, 0])), *hits, reports]))
"""


@pytest.mark.inductor
def test_a_second_process_gets_full_hits_and_never_the_graph_of_other_options(tmp_path):
    script = tmp_path / "cached.py"
    script.write_text(SCRIPT)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "FIXPASS_VERIFY": "0"}

    def run():
        printed = run_python("-P", script, cwd=tmp_path, **cache)
        return [json.loads(line) for line in printed.splitlines()]

    cold, warm = run(), run()
    assert [value for value, *_ in cold] == [1, 2, 3]
    # An AOTAutograd hit that loads its graph from the FX cache counts there too.
    assert [line[:3] for line in warm] == [[1, 1, 1], [2, 1, 1], [3, 1, 1]]
    assert [len(reports) for *_, reports in cold] == [1, 1, 1]
    assert "became rms_norm of f32[4, 8]" in cold[0][-1][0]
    assert [line[-1] for line in warm] == [line[-1] for line in cold]

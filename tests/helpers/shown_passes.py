"""What one pass does to a function, as docs/passes.md prints it."""

import re
import textwrap

import torch

from fixpass import Config, Pipeline, Report
from fixpass.dynamo_stage import run_entry_passes
from fixpass.lowering.target import target_named
from fixpass.passes import default_passes
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Policy
from fixpass.testing import text, trace

COLUMNS = re.compile(r"(?<=\S) {2,}")
# Dynamo's names of inputs, such as l_self_modules_gate_parameters_weight_, and values that it does
# not record.
DYNAMO = ((r"\bl_(?:\w*?_modules_)?(\w+?)_\b", r"\1"), (r"_parameters_", "_"), (r": (?=[,)])", ""))


def show(name, fn, *args, target="cuda:sm_90"):
    """Print the graph before and after a pass of `default_passes`, and the remarks of the pass.

    The passes in front of it have run on the graph before.
    """
    device = target_named(target)
    collectives = PlaceSymmetricMemory(device, Policy(), "", lambda name, _: GroupFacts(name, 2))
    steps = default_passes(device, collectives, SelectLinearKernel(enabled=target == "cpu"))
    index = [step.name for step in steps].index(name)
    graph = trace(fn, *args).graph
    Pipeline(steps[:index], strict=True).run(graph)
    _print(graph, lambda: (graph, Pipeline(steps[index : index + 1], strict=True).run(graph)))


def show_entry(name, fn, *args):
    """The same for a pass of `entry_passes`, which sees Dynamo's graph."""
    passes = ("functionalize-norms", "fold-weights", "prepack-linears")
    others = tuple(other for other in passes if other != name)

    def backend(gm, example_inputs):
        def run():
            entry = run_entry_passes(gm, example_inputs, Config(disable=others))
            return entry.gm.graph, Report(entry.report.of_pass(name))

        def pack():
            # float32 by name, so that the page is the same on every machine.
            step = PrepackLinears((torch.float32,))
            return folded.gm.graph, Pipeline((step,), strict=True).run(folded.gm.graph)

        if name == "prepack-linears":
            folded = run_entry_passes(gm, example_inputs, Config(disable=(name,)))
            _print(folded.gm.graph, pack)
        else:
            _print(gm.graph, run)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)


def _print(graph, run):
    print("before")
    print(_indented(graph))
    after, report = run()
    print("after")
    print(_indented(after))
    print("remarks")
    for remark in report.remarks or ("none",):
        print(f"    {remark}")


def _indented(graph):
    """The graph with two blanks between columns, for which a page has no room."""
    shown = COLUMNS.sub("  ", text(graph)).strip()
    for pattern, instead in DYNAMO:
        shown = re.sub(pattern, instead, shown)
    return textwrap.indent(shown, "    ")

"""Linear layers over one input become one call: q, k and v of attention, gate and up of an MLP.

On CPU the call takes a list of weights, so each stays where it is: there is no second copy, and an
update is read by the next call. One launch wakes the threads once and reads x once. Elsewhere a
joined matmul needs its weights side by side in one storage; the layers stay as they are there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fixpass.passes.base import Pass, PassResult, module_path
from fixpass.passes.cost import VIEWS
from fixpass.passes.rewrite import RESHAPES, Editor, erase_dead, find_anchors, is_call
from fixpass.passes.select_linear_kernel import MATMULS

ELSEWHERE = (
    "one matmul over {} needs their weights side by side in one storage, and fixpass makes no "
    "second copy of a weight"
)


@dataclass(frozen=True)
class JoinLinears(Pass):
    """Several `fixpass::skinny_linear` to one `fixpass::skinny_linears`."""

    name: ClassVar[str] = "join-linears"

    device_type: str = "cpu"
    """Where the graph runs."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        one = torch.ops.fixpass.skinny_linear.default
        on_cpu = self.device_type == "cpu"
        for group in _groups(graph, (one,) if on_cpu else MATMULS):
            if not on_cpu:
                result.missed(group[0], ELSEWHERE.format(_names(group)))
                continue
            joined = [node for node in group if _can_move(node, group[0])]
            for node in group:
                if node not in joined:
                    result.missed(node, f"its weight is computed behind {group[0].name}")
            if len(joined) > 1 and result.take_fuel():
                _join(graph, joined, result)


def _groups(graph: fx.Graph, targets: tuple[Any, ...]) -> list[list[fx.Node]]:
    """The layers that read one x, in the order of the graph, where they are several."""
    found: dict[tuple[fx.Node, str], list[fx.Node]] = {}
    for node in sorted(find_anchors(graph, targets)):
        x = node.args[1 if is_call(node, torch.ops.aten.addmm.default) else 0]
        assert isinstance(x, fx.Node)
        shape = str(tuple(x.meta["val"].shape))
        found.setdefault((_reshaped(x), shape), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _names(group: Sequence[fx.Node]) -> str:
    """The layers as their modules are called: `q_proj, k_proj`."""
    return ", ".join(module_path(node).rpartition(".")[2] or node.name for node in group)


def _reshaped(x: fx.Node) -> fx.Node:
    """The node of which x is another shape."""
    while is_call(x, *RESHAPES) and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _can_move(node: fx.Node, first: fx.Node) -> bool:
    """Whether weight and bias are there before `first`, but for views of inputs."""
    operands = [operand for operand in node.args[1:] if isinstance(operand, fx.Node)]
    return all(operand < first or _is_view_of_input(operand) for operand in operands)


def _is_view_of_input(node: fx.Node) -> bool:
    while is_call(node, *VIEWS) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.op in ("placeholder", "get_attr")


def _move_before(node: fx.Node, first: fx.Node) -> None:
    if node < first:
        return
    for operand in node.all_input_nodes:
        _move_before(operand, first)
    first.prepend(node)


def _join(graph: fx.Graph, group: Sequence[fx.Node], result: PassResult) -> None:
    first = group[0]
    weights, biases = ([node.args[i] for node in group] for i in (1, 2))
    for operand in (*weights, *biases):
        if isinstance(operand, fx.Node):
            _move_before(operand, first)
    edit = Editor(graph, first)
    args = (first.args[0], weights, biases)
    call = edit.call(torch.ops.fixpass.skinny_linears.default, args)
    result.applied(call, f"one call computes {_names(group)}")
    results = [edit.call(getitem, (call, i)) for i in range(len(group))]
    for node, new in zip(group, results, strict=True):
        node.replace_all_uses_with(new)
        erase_dead(graph, node)

"""Norms that Inductor is to compile become ordinary ATen operations, so that they fuse.

The decomposition is the op's own reference, traced once for each kind of site and then inlined.
What each step gives is known from the trace, and running it again on fake tensors for every site
would be most of the cost of all passes: sites of one kind share what is recorded for the steps
inside, which nothing else can read, and each has its own record of its results. Norms with another
kernel stay single ops.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from fixpass.lowering.site import OPS, op_name
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.rewrite import (
    Editor,
    arg,
    copy_of,
    erase_dead,
    find_anchors,
    guards_suppressed,
)
from fixpass.runtime.ops import REFERENCES


@dataclass(frozen=True)
class LowerNorms(Pass):
    """`fixpass::` norms with kernel "inductor" to their decompositions."""

    name: ClassVar[str] = "lower-norms"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        templates: dict[Any, fx.Graph] = {}
        for node in list(find_anchors(graph, tuple(op_overload(op) for op in OPS))):
            if node.kwargs.get("kernel_name") != "inductor" or not result.take_fuel():
                continue
            key = _kind(node)
            if key not in templates:
                templates[key] = _trace(node)
            with unset_fake_temporarily():
                _inline(graph, node, templates[key])
            result.changed = True


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What the decomposition depends on."""
    operands = tuple(_layout(a.meta["val"]) if isinstance(a, fx.Node) else a for a in node.args)
    return (op_name(node), operands, repr(node.kwargs))


def _layout(val: torch.Tensor) -> tuple[Any, ...]:
    """The layout as a key: symbolic numbers have no hash, so their names stand for them."""
    dims = (*val.shape, *val.stride())
    is_static = all(type(dim) is int for dim in dims)
    return (dims if is_static else str(dims), val.dtype, val.device)


def _trace(node: fx.Node) -> fx.Graph:
    """The reference of `node`'s op as ATen operations on its operands, in their order."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    steps = {k: v for k, v in node.kwargs.items() if k != "kernel_name"}

    def reference(*values: torch.Tensor) -> Any:
        given = iter(values)
        args = [next(given) if isinstance(a, fx.Node) else a for a in node.args]
        return REFERENCES[op_name(node)](*args, **steps)

    vals = [operand.meta["val"] for operand in operands]
    with guards_suppressed(vals):
        traced = make_fx(reference, select_decomp_table())(*vals)
    traced.graph.eliminate_dead_code()
    for step in traced.graph.nodes:
        # A view lies in the storage of its own site's operands, so it is run again for each.
        if step.op == "call_function" and not _gives_new_tensor(step):
            step.meta.pop("val", None)
    return traced.graph


def _gives_new_tensor(step: fx.Node) -> bool:
    if not isinstance(step.target, torch._ops.OpOverload):
        return False
    is_view = any(result.alias_info is not None for result in step.target._schema.returns)
    return isinstance(step.meta["val"], FakeTensor) and not is_view


def _results(template: fx.Graph) -> list[fx.Node]:
    return list(template.output_node().all_input_nodes)


def _inline(graph: fx.Graph, node: fx.Node, template: fx.Graph) -> None:
    edit = Editor(graph, node)
    operands = iter([a for a in node.args if isinstance(a, fx.Node)])
    values: dict[fx.Node, fx.Node] = {}
    own = {step: copy_of(step.meta["val"]) for step in _results(template) if "val" in step.meta}
    for step in template.nodes:
        if step.op == "placeholder":
            values[step] = next(operands)
        elif step.op == "call_function":
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
            val = own.get(step, step.meta.get("val"))
            values[step] = edit.call(step.target, args, kwargs, val)
    results: Any = fx.node.map_arg(template.output_node().args[0], lambda n: values[n])
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(edit.with_strides_of(results, node.meta["val"]))
    else:
        for user in list(node.users):
            part = results[arg(user, 1)]
            user.replace_all_uses_with(edit.with_strides_of(part, user.meta["val"]))
            graph.erase_node(user)
        for part in results:
            erase_dead(graph, part)
    graph.erase_node(node)

"""vLLM's IR ops in our graphs: they are made functional first, and the remaining ones lowered last.

vLLM does both itself in its own compile mode. Norms are not handled here: `canonicalize-norms`
knows vLLM's norm ops by name and has replaced them when the others are lowered.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.ir.op import IrOp

from fixpass.lowering.layout import Layout
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.rewrite import Editor, guards_suppressed

NAMESPACE = "vllm_ir"
IN_PLACE = "maybe_inplace"


@dataclass(frozen=True)
class FunctionalizeVllmIr(Pass):
    """Overloads that may write into their activations become the functional ones.

    vLLM promises that nothing reads such an activation behind the call.
    """

    name: ClassVar[str] = "functionalize-vllm-ir"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in graph.nodes:
            if not _is_ir(node.target) or node.target._overloadname != IN_PLACE:
                continue
            node.target = IrOp.registry[_name(node.target)].torch_op
            result.changed = True


@dataclass(frozen=True)
class LowerVllmIr(Pass):
    """IR ops that no pass has replaced become the operations of vLLM's own implementation."""

    name: ClassVar[str] = "lower-vllm-ir"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in list(graph.nodes):
            if _is_ir(node.target) and result.take_fuel():
                result.applied(node, _inline(graph, node))


def _is_ir(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.split("::")[1]


def _inline(graph: fx.Graph, node: fx.Node) -> str:
    """Replace `node` by the implementation's operations; return the report's line."""
    op = IrOp.registry[_name(node.target)]  # type: ignore[arg-type]
    given = op.apply_arg_defaults(node.args)
    tensors = [arg for arg in given if isinstance(arg, fx.Node)]
    vals = [arg.meta["val"] for arg in tensors]
    with guards_suppressed(vals):
        chosen = op.dispatch(*(_val(arg) for arg in given))

        def implementation(*values: torch.Tensor) -> Any:
            left = iter(values)
            args = [next(left) if isinstance(arg, fx.Node) else arg for arg in given]
            return chosen.func_impl_fn(*args)

        traced = make_fx(implementation, select_decomp_table())(*vals)
    traced.graph.eliminate_dead_code()
    _copy_in(graph, node, traced.graph, tensors)
    return f"{op.name} became {chosen.provider} operations of {Layout.of(vals[0])}"


def _copy_in(graph: fx.Graph, node: fx.Node, body: fx.Graph, operands: list[fx.Node]) -> None:
    edit = Editor(graph, node)
    left = iter(operands)
    values: dict[fx.Node, fx.Node] = {}
    for step in body.nodes:
        if step.op == "placeholder":
            values[step] = next(left)
        elif step.op == "call_function":
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
            values[step] = edit.call(step.target, args, kwargs)
    results: Any = fx.node.map_arg(body.output_node().args[0], lambda n: values[n])
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(edit.with_strides_of(results, node.meta["val"]))
    else:
        for user in list(node.users):
            part = results[user.args[1]]
            user.replace_all_uses_with(edit.with_strides_of(part, user.meta["val"]))
            graph.erase_node(user)
    graph.erase_node(node)


def _val(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg

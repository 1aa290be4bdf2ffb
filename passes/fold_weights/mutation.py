"""Finds the weights, and the values computed from weights, that the graph writes into.

Such a value cannot be computed ahead of the call; nor can a value that shares its memory. A write
is known from an op's schema, from the name of a method or operator, or from a fake tensor whose
version rose while Dynamo traced. An unknown call is taken to write into all its inputs.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fixpass.passes.fold_weights.constant_values import Value
from fixpass.passes.fold_weights.graph_weights import Weight

_OPERATORS = (
    operator.setitem,
    operator.delitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv")),
    *(getattr(operator, f"i{name}") for name in ("mod", "pow", "and", "or", "xor")),
    *(getattr(operator, f"i{name}") for name in ("lshift", "rshift", "matmul", "concat")),
)


def written_memory(
    graph: fx.Graph, weights: Mapping[fx.Node, Weight], values: Mapping[fx.Node, Value]
) -> frozenset[fx.Node]:
    """The weights and computed values whose memory is written, in part or whole, by the graph."""
    written: set[fx.Node] = set()
    for node in (*weights, *values):
        memory = values[node].memory if node in values else frozenset((node,))
        if _rose(node, values) or any(node in _written_by(user) for user in _others(node, values)):
            written |= memory
    written |= set(_aliases(graph, weights, written))
    return frozenset(written)


def unwritten(values: Mapping[fx.Node, Value], written: frozenset[fx.Node]) -> dict[fx.Node, Value]:
    """The values that are not computed from a written value. Written weights do not count here."""
    kept: dict[fx.Node, Value] = {}
    for node, value in values.items():
        inputs = [source for source in node.all_input_nodes if source in values]
        if all(source in kept for source in inputs) and node not in written:
            kept[node] = value
    return kept


def _others(node: fx.Node, values: Mapping[fx.Node, Value]) -> Iterator[fx.Node]:
    """The users of a node that are not known to be functions of their inputs."""
    return (user for user in node.users if user not in values and user.op != "output")


def _rose(node: fx.Node, values: Mapping[fx.Node, Value]) -> bool:
    """Whether the graph wrote into the node's fake tensor after its creation."""
    traced = node.meta.get("example_value")
    if not isinstance(traced, Tensor) or traced.is_inference():
        return False
    if node in values and not values[node].is_computed:
        # A view shares the count of its base, which is asked by itself.
        return False
    before = values[node].version if node in values else 0
    return traced._version > before


def _written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs that a node may write into."""
    target: Any = node.target
    first = node.all_input_nodes[:1] if node.args and isinstance(node.args[0], fx.Node) else []
    if node.op == "call_method":
        name = str(target)
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        return tuple(first) if writes else _out_of(node)
    if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
        return tuple(node.all_input_nodes)
    if isinstance(target, torch._ops.OpOverload):
        return tuple(node.all_input_nodes) if target._schema.is_mutable else ()
    if isinstance(target, torch._ops.OpOverloadPacket):
        mutable = any(getattr(target, name)._schema.is_mutable for name in target.overloads())
        return tuple(node.all_input_nodes) if mutable and _may_write(target) else ()
    name = str(getattr(target, "__name__", ""))
    if target in _OPERATORS:
        return tuple(first)
    if name.endswith("_") and not name.endswith("__"):
        return tuple(node.all_input_nodes)
    if node.kwargs.get("inplace") is True:
        return tuple(node.all_input_nodes)
    return _out_of(node)


def _may_write(packet: torch._ops.OpOverloadPacket) -> bool:
    """Whether an overload of the packet writes, apart from `out` overloads, which need `out=`."""
    return any(
        getattr(packet, name)._schema.is_mutable and not name.endswith("out")
        for name in packet.overloads()
    )


def _out_of(node: fx.Node) -> tuple[fx.Node, ...]:
    out = node.kwargs.get("out")
    return tuple(n for n in _nodes(out))


def _nodes(argument: Any) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, lambda node: found.append(node))
    return found


def _aliases(
    graph: fx.Graph, weights: Mapping[fx.Node, Weight], written: set[fx.Node]
) -> Iterator[fx.Node]:
    """Weights that share their storage with an input that is written."""
    addresses = set()
    for node in graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        example = argument.example if argument is not None and argument.is_tensor else None
        if not isinstance(example, Tensor) or example.layout != torch.strided:
            continue
        is_written = node in written or _rose(node, {})
        if is_written and not torch._C._functorch.is_functorch_wrapped_tensor(example):
            addresses.add(example.untyped_storage()._cdata)
    for node, weight in weights.items():
        plain = not weight.why
        if plain and addresses and weight.tensor.untyped_storage()._cdata in addresses:
            yield node

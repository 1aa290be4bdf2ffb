"""Graphs as text, small enough to read in a test.

Strides stand only where a tensor is not dense, symbols are numbered in the order in which they
appear, and arguments that have their default value are left out. It prints; it never changes.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._library.fake_class_registry import FakeScriptObject

from fixpass.lowering.layout import Layout, dtype_name


def format_graph(graph: fx.Graph) -> str:
    """The graph as text: one line a node, its value's layout on the right."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    header = ", ".join(_format_input(n) for n in inputs)
    rows = [_format_node(n) for n in graph.nodes if n.op not in ("placeholder", "output")]
    width = max((len(left) for left, _ in rows), default=0)
    lines = [f"graph({header})"]
    lines += [f"    {left:<{width}}  {right}".rstrip() for left, right in rows]
    result = graph.output_node().args[0]
    lines.append(f"    return {_format_results(result)}")
    return renumber_symbols("\n".join(lines) + "\n")


def renumber_symbols(text: str) -> str:
    """Rename the symbols s72, s10, u3, ... to s0, s1, u0, ... by first appearance."""
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        found = match.group(0)
        if found not in names:
            count = sum(name[0] == found[0] for name in names)
            names[found] = f"{found[0]}{count}"
        return names[found]

    return re.sub(r"\b[su]\d+\b", rename, text)


def format_value(val: Any) -> str:
    """`bf16[s0, 128][s1, 1]` for a tensor, the expression for a symbolic number."""
    if isinstance(val, torch.Tensor):
        return str(Layout.of(val)) if val.layout == torch.strided else str(val.layout)
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(format_value(v) for v in val) + ")"
    if isinstance(val, FakeScriptObject):
        return "object"
    return "" if val is None else str(val)


def _format_input(node: fx.Node) -> str:
    value = format_value(node.meta.get("val"))
    return node.name if node.name == value else f"{node.name}: {value}"


def _format_node(node: fx.Node) -> tuple[str, str]:
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}", format_value(node.meta.get("val"))
    arguments = [_format_argument(a) for a in node.args]
    defaults = _defaults(node.target)
    arguments += [
        f"{k}={_format_argument(v)}" for k, v in node.kwargs.items() if v != defaults.get(k)
    ]
    call = f"{node.name} = {_format_target(node.target)}({', '.join(arguments)})"
    return call, format_value(node.meta.get("val"))


def _defaults(target: Any) -> dict[str, Any]:
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}


def _format_target(target: Any) -> str:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = str(target).removeprefix("aten.").removeprefix("prims.")
    return name.removesuffix(".default")


def _format_argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, torch.dtype):
        return dtype_name(arg)
    if isinstance(arg, (tuple, list)):
        return "[" + ", ".join(_format_argument(a) for a in arg) + "]"
    if isinstance(arg, torch.memory_format):
        return str(arg).removeprefix("torch.")
    return repr(arg) if isinstance(arg, str) else str(arg)


def _format_results(result: Any) -> str:
    items: Iterable[Any] = result if isinstance(result, (tuple, list)) else (result,)
    return ", ".join(_format_argument(item) for item in items)

"""Finds the linear layers of Dynamo's graph whose weight is a folded value.

There may be views between the folded input and a layer. All readers of the input and of its views
must be such layers; otherwise the graph needs the plain value. This module changes nothing.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fixpass.lowering.layout import Layout, known_equal
from fixpass.passes.fold_weights.constant_values import view_of
from fixpass.passes.rewrite import Missed

_LINEAR = torch.nn.functional.linear
_MATMULS = (operator.matmul, torch.matmul, torch.mm)
_METHODS = ("matmul", "mm", "__matmul__")


@dataclass(frozen=True)
class FoldedLinear:
    """One layer, x (..., in_features) by `weight`, a view of the folded input.

    views: the nodes from the input to `weight`. transposed: `weight` is (in_features,
    out_features), as a product has it, and not (out_features, in_features).
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    views: tuple[fx.Node, ...]
    bias: fx.Node | None
    transposed: bool

    @property
    def form(self) -> tuple[fx.Node, bool]:
        """Equal for layers that read one weight in one way."""
        return self.weight, self.transposed

    @property
    def out_features(self) -> int:
        return int(self.weight.meta["example_value"].shape[1 if self.transposed else 0])


def linears_of(folded: fx.Node) -> list[FoldedLinear] | Missed:
    """The linear layers that read the folded input, or why there are other readers."""
    found = []
    for views, node in _readers(folded, ()):
        linear = _linear(node, (folded, *views)[-1], views)
        why = "is no linear layer over it" if linear is None else _against(linear)
        if linear is None or why:
            return Missed(f"{node.name} {why}")
        found.append(linear)
    return found


def weight_of(linear: FoldedLinear) -> fx.GraphModule:
    """The function from the folded value to the layer's weight (out_features, in_features)."""
    graph = fx.Graph()
    last = graph.placeholder("value")
    for node in linear.views:
        last = graph.node_copy(node, lambda _, source=last: source)  # type: ignore[misc]
        last.meta = {}
    graph.output(graph.call_method("t", (last,)) if linear.transposed else last)
    return fx.GraphModule(torch.nn.Module(), graph)


def _readers(
    node: fx.Node, views: tuple[fx.Node, ...]
) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """The readers of the node through views, each with these views."""
    for user in node.users:
        if view_of(user) is node:
            yield from _readers(user, (*views, user))
        else:
            yield views, user


def _linear(node: fx.Node, weight: fx.Node, views: tuple[fx.Node, ...]) -> FoldedLinear | None:
    kwargs: Mapping[str, Any] = node.kwargs
    is_call, target = node.op == "call_function", node.target
    if is_call and target is _LINEAR and set(kwargs) <= {"bias"}:
        x, operand, *rest = node.args
        bias = rest[0] if rest else kwargs.get("bias")
        transposed = False
    elif (target in (_MATMULS if is_call else _METHODS)) and not kwargs and len(node.args) == 2:
        x, operand = node.args
        bias, transposed = None, True
    else:
        return None
    if operand is not weight or not isinstance(x, fx.Node) or weight in (x, bias):
        return None
    if not isinstance(bias, fx.Node | None):
        return None
    return FoldedLinear(node, x, weight, views, bias, transposed)


def _against(linear: FoldedLinear) -> str:
    """The reason for which oneDNN's layer cannot be used, or ""."""
    nodes = (linear.x, linear.weight, linear.node, *([linear.bias] if linear.bias else []))
    found = [val for node in nodes if _is_plain(val := node.meta.get("example_value"))]
    if len(found) < len(nodes):
        return "reads or gives what is no plain tensor"
    x, weight, out, *bias = found
    if weight.dim() != 2 or x.dim() < 2:
        return f"multiplies {x.dim()} by {weight.dim()} dimensions"
    alike = weight.dtype, weight.device
    if (x.dtype, x.device) != alike:
        return f"reads {Layout.of(x)} on {x.device}"
    if bias and not _is_vector(bias[0], weight, linear.out_features):
        return f"has the bias {Layout.of(bias[0])}"
    if out.requires_grad:
        return "gets a gradient"
    if Layout.of(out).is_dense() is not True:
        return f"gives {Layout.of(out)}, which is not dense"
    return ""


def _is_vector(bias: Tensor, weight: Tensor, size: int) -> bool:
    alike = (bias.dtype, bias.device) == (weight.dtype, weight.device)
    return alike and bias.dim() == 1 and known_equal(bias.shape[0], size) is True


def _is_plain(val: object) -> TypeGuard[Tensor]:
    return (
        isinstance(val, Tensor)
        and not is_traceable_wrapper_subclass(val)
        and val.layout is torch.strided
        and not val.is_nested
    )

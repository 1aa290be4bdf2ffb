"""Finds the weights among the inputs of Dynamo's graph: parameters and buffers, with live tensors.

A weight that cannot be folded has a reason. Plain tensors that a module keeps as attributes do not
count as weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.variables.builder import GraphArg
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that the graph reads."""

    node: fx.Node
    position: int
    """The place of the weight among all inputs of the graph."""
    tensor: Tensor
    name: str
    why: str = ""
    """The reason for which the weight cannot be folded, or ""."""
    opaque: bool = False
    """Nodes that read the weight cannot be evaluated on fake tensors."""


def weights_of(graph: fx.Graph) -> dict[fx.Node, Weight]:
    """The weights among the inputs of `graph`."""
    found = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        argument = node.meta.get("grapharg")
        if not isinstance(argument, GraphArg) or not isinstance(argument.example, Tensor):
            continue
        # `name` is a property in some releases of torch, and a method in others.
        name: Any = argument.source.name if argument.source is not None else ""
        path = name if isinstance(name, str) else name()
        if isinstance(argument.example, nn.Parameter) or "._buffers[" in path:
            opaque = _opaque(argument.example, node.meta.get("example_value"))
            why = opaque or _obstacle(argument.example)
            found[node] = Weight(
                node, position, argument.example, _short(path), why, opaque=bool(opaque)
            )
    return found


def examples_of(graph: fx.Graph, weights: Mapping[fx.Node, Weight]) -> list[Tensor | None]:
    """One entry for each input of `graph`: the live weight, or None for other inputs."""
    inputs = graph.find_nodes(op="placeholder")
    return [weights[node].tensor if node in weights else None for node in inputs]


def _short(path: str) -> str:
    """`layers.0.qkv.weight` for what Dynamo calls L['self']._modules['layers']._modules..."""
    parts = re.findall(r"\['(\w+)'\]|\[(\d+)\]|\.(\w+)", path)
    inner = ("_modules", "_parameters", "_buffers")
    names = [a or b or c for a, b, c in parts[1:]] or [parts[0][0]] if parts else [path]
    return ".".join(name for name in names if name not in inner)


def _opaque(tensor: Tensor, fake: object) -> str:
    if isinstance(tensor, FakeTensor) or not isinstance(fake, FakeTensor):
        return "is not known as a real tensor"
    if is_traceable_wrapper_subclass(tensor) or _has_own_dispatch(tensor):
        return f"is a {type(tensor).__name__}: its parts may change behind it"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is {tensor.layout}"
    if not all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        return "has a dynamic shape"
    return ""


def _obstacle(tensor: Tensor) -> str:
    if tensor.device.type == "meta":
        return "is on the meta device"
    if tensor.is_inference():
        return "was made in inference mode, where torch counts no writes"
    return ""


def _has_own_dispatch(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__

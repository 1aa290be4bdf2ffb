"""An ATen graph as it would be on a device that is not here.

Every value is recorded anew: inputs become fake tensors that claim the device, with the sizes and
strides that they had, and each operation is run again on them. The choices that PyTorch made while
tracing, such as which attention kernel to call, stay those of the device that was traced on.
Nothing of the graph can be run.
"""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from fixpass.passes.rewrite import copy_of, guards_suppressed


def claim_device(graph: fx.Graph, device_type: str) -> None:
    """Let every value of `graph` say that it is on `device_type`; changes the graph in place."""
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, 0)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            node.meta["val"] = pytree.tree_map(lambda v: _on(v, device), node.meta.get("val"))
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda a: _moved(a, device))
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: _moved(a, device))
            _record(node)


def _record(node: fx.Node) -> None:
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda source: source.meta.get("val"), (node.args, node.kwargs)
    )
    if any(isinstance(v, FakeTensor) for v in pytree.tree_leaves(node.meta.get("val"))):
        with guards_suppressed((args, node.meta["val"])):
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _moved(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) else argument


def _on(value: Any, device: torch.device) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with unset_fake_temporarily():
        return copy_of(value, device)

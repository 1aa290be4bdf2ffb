"""Name the module that owns a norm's weight on the nodes that read the weight.

A model may call a method of a norm, as `self.q_norm.forward_native(q)`. Dynamo then records the
module around that call, and every remark would name `self_attn`. Runs on Dynamo's graph.
"""

from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.variables.builder import GraphArg

from fixpass.passes.base import plain_path


def name_owners(graph: fx.Graph) -> None:
    """Append the owner of each 1-D parameter to the module stack of the nodes that apply it."""
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("example_value"), nn.Parameter) and _is_vector(node):
            owner = _owner(node.meta.get("grapharg"))
            for reader in _readers(node) if owner else ():
                _append(reader, owner)


def _owner(argument: Any) -> str:
    if not isinstance(argument, GraphArg) or argument.source is None:
        return ""
    # A property in some releases of torch, a method in others.
    name: Any = argument.source.name
    return (name if isinstance(name, str) else name()).rpartition("._parameters[")[0]


def _readers(weight: fx.Node) -> list[fx.Node]:
    """The nodes that apply the weight, or a vector computed from it, to something else."""
    queue, found = list(weight.users), []
    for node in queue:
        if _is_vector(node):
            queue += node.users
        else:
            found.append(node)
    return found


def _is_vector(node: fx.Node) -> bool:
    val = node.meta.get("example_value")
    return isinstance(val, torch.Tensor) and val.dim() == 1


def _append(node: fx.Node, owner: str) -> None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [plain_path(str(path)) for path, _ in stack.values()]
    if paths and plain_path(owner).startswith(f"{paths[-1]}." if paths[-1] else ""):
        node.meta["nn_module_stack"] = {**stack, owner: (owner, nn.Module)}

"""Make each norm's eps a constant of the graph, where Dynamo made it an input.

With `dynamic=True` a float that a module keeps, such as `self.variance_epsilon`, becomes a symbol
and then a tensor: no rewrite and no kernel knows its value. Dynamo is asked to trace once more
with those floats fixed and guarded, the way Inductor asks for floats it cannot carry. Other floats
keep what Dynamo decided.
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.nn import functional

from fixpass.passes.canonicalize_norms.opaque import OPAQUE_NORMS
from fixpass.runtime.providers import op_exists

_NORMS = (functional.rms_norm, functional.layer_norm, torch.rms_norm, torch.layer_norm)
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ROOTS = (torch.rsqrt, torch.sqrt, torch.pow, operator.pow, "rsqrt", "sqrt", "pow")


def specialize_eps(graph: fx.Graph) -> None:
    """Restart Dynamo's trace when a norm of its graph has a symbolic eps; else do nothing."""
    norms = (*_NORMS, *_opaque_norms())
    floats = list(_symbolic_floats(graph))
    wanted = {name for node, name in floats if _is_eps(node, norms)}
    wanted = {name for name in wanted if not TensorifyState.should_specialize(name)}
    if not wanted:
        return
    # What Inductor is going to fix as well would cost a trace of its own later on.
    wanted |= {name for node, name in floats if _is_fixed_anyway(node)}
    for name in sorted(wanted):
        TensorifyState.specialize(name)
    raise TensorifyScalarRestartAnalysis(restart_reason="fixpass needs the value of a norm's eps")


def _symbolic_floats(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Each float input of the graph as the node that reads it, and its symbol."""
    for node in graph.find_nodes(op="call_method", target="item"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and value.node._expr.is_Symbol:
            yield node, value.node._expr.name


def _is_eps(value: fx.Node, norms: tuple[object, ...]) -> bool:
    if any(user.target in norms for user in value.users):
        return True
    sums = (user for user in value.users if user.target in _ADDS)
    return any(user.target in _ROOTS for total in sums for user in total.users)


def _is_fixed_anyway(value: fx.Node) -> bool:
    """Whether the float is a constant by now, or `norm_type`, which no embedding computes with."""
    if value.meta["example_value"].node.expr.is_number:
        return True
    return all(user.target is functional.embedding for user in value.users)


def _opaque_norms() -> Iterator[object]:
    """The norm ops of other libraries that exist here, as Dynamo's graph calls them."""
    for row in OPAQUE_NORMS:
        if op_exists(row.name):
            yield from (row.overload, row.overload.overloadpacket)

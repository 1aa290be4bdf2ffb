"""Finds the values of Dynamo's graph that depend only on weights, by running nodes on fake tensors.

A value counts if all ops that compute it are functions of their inputs: no op writes, draws random
numbers, depends on data or communicates. The ATen ops that run on the fake tensors decide this, not
the names of the nodes. A value that needs no op but views is not computed: a view costs nothing and
stays in the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fixpass.passes.fold_weights.graph_weights import Weight
from fixpass.passes.rewrite import guards_suppressed

# Constants that a rearrangement may need, such as an index.
FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full, torch.eye)
_GATHERS = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
)
# Namespaces whose ops do only what their schemas say. Ops of other libraries may keep state, and
# collectives must run on all ranks.
_KNOWN = ("aten", "prims", "fixpass", "quantized_decomposed")


@dataclass(frozen=True)
class Value:
    """A value that depends only on weights."""

    node: fx.Node
    val: Any
    """The result of the node on fake tensors."""
    is_computed: bool
    """An op other than a view computed it."""
    sources: frozenset[fx.Node]
    """The weights that it depends on."""
    memory: frozenset[fx.Node]
    """The nodes whose memory it may be a view of."""
    version: int = 0
    """The number of writes into its memory at the time when it was made."""
    moved: int = 0
    """Bytes that its own ops read and write."""


@dataclass(frozen=True)
class Values:
    """The values of a graph that depend only on weights, in the order of the graph."""

    found: dict[fx.Node, Value]
    refused: dict[fx.Node, str]
    """Nodes that read only weights and are no functions of them, each with the reason."""


def values_of(graph: fx.Graph, weights: Mapping[fx.Node, Weight]) -> Values:
    """All values of `graph` that depend only on `weights`, without the weights themselves."""
    values = Values({}, {})
    known: dict[fx.Node, Value] = {}
    for node in weights:
        own = frozenset((node,))
        known[node] = Value(node, _fresh(node.meta.get("example_value")), False, own, own)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or not _reads_only(node, known):
            continue
        why = _untrusted(node) or _opaque_source(node, known, weights)
        found = why or _evaluate(node, known)
        if isinstance(found, Value):
            values.found[node] = known[node] = found
        elif found:
            values.refused[node] = found
    return values


def is_computed(nodes: Sequence[fx.Node], weights: Mapping[fx.Node, Tensor]) -> bool:
    """Whether any of the nodes computes something, and is no view, for these fake weights."""
    known = {
        node: Value(node, val, False, frozenset(), frozenset()) for node, val in weights.items()
    }
    for node in nodes:
        found = _evaluate(node, known)
        if not isinstance(found, Value) or found.is_computed:
            return True
        known[node] = found
    return False


def view_of(node: fx.Node) -> fx.Node | None:
    """The tensor that the node is a view of, or None if the node is no view of its only input."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return None
    source = node.all_input_nodes[0]
    val = _fresh(source.meta.get("example_value"))
    if not isinstance(val, Tensor) or _untrusted(node) or is_computed([node], {source: val}):
        return None
    return source


def candidates_in(graph: fx.Graph, weights: Mapping[fx.Node, Weight]) -> bool:
    """Whether any node reads only weights. This is cheap, so the pass asks it first."""
    return any(
        node.op in ("call_function", "call_method")
        and node.all_input_nodes
        and all(source in weights for source in node.all_input_nodes)
        for node in graph.nodes
    )


def _reads_only(node: fx.Node, known: Mapping[fx.Node, Value]) -> bool:
    if not node.all_input_nodes:
        return node.target in FACTORIES
    return all(source in known for source in node.all_input_nodes)


def _untrusted(node: fx.Node) -> str:
    """The reason for which the node must not run on fake tensors (unseen effects), or ""."""
    target = node.target
    if node.op == "call_method" or isinstance(
        target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    ):
        return ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target.name()} calls a graph of its own"
    module = getattr(target, "__module__", None) or "builtins"
    if module.partition(".")[0] in ("torch", "_operator", "builtins"):
        return ""
    return f"{getattr(target, '__qualname__', target)} is a function that torch does not look into"


def _opaque_source(
    node: fx.Node, known: Mapping[fx.Node, Value], weights: Mapping[fx.Node, Weight]
) -> str:
    for source in node.all_input_nodes:
        for weight in known[source].sources:
            if weights[weight].opaque:
                return f"{weights[weight].name} {weights[weight].why}"
    return ""


def _evaluate(node: fx.Node, known: Mapping[fx.Node, Value]) -> Value | str:
    inputs = [known[source] for source in node.all_input_nodes]
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda source: known[source].val, (node.args, node.kwargs)
    )
    fakes = [i.val for i in inputs] or [v.val for v in known.values()]
    recorder = _Recorder()
    try:
        with guards_suppressed(fakes), torch.no_grad(), recorder:
            val = _call(node, args, kwargs)
    except _ImpureError as error:
        return str(error)
    # A node that fails on fake tensors cannot be folded, whatever the error.
    except Exception as error:
        return f"it does not run on its own: {type(error).__name__}"
    if not all(_is_plain(leaf) for leaf in pytree.tree_leaves(val)):
        return "its result is no plain tensor"
    is_computed = recorder.is_computed or any(_passes_on(node, i) for i in inputs)
    memory = [i.memory for i in inputs if not is_computed]
    return Value(
        node,
        val,
        is_computed,
        frozenset().union(*(i.sources for i in inputs)),
        frozenset().union(*memory) if memory else frozenset((node,)),
        val._version if isinstance(val, Tensor) and not val.is_inference() else 0,
        recorder.moved,
    )


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _passes_on(node: fx.Node, value: Value) -> bool:
    """Whether the node takes a computed tensor out of a tuple."""
    return node.target is getitem and value.is_computed and not isinstance(value.val, Tensor)


def _is_plain(leaf: object) -> bool:
    if isinstance(leaf, Tensor):
        sizes = (*leaf.shape, *leaf.stride()) if leaf.layout == torch.strided else (None,)
        return isinstance(leaf, FakeTensor) and all(isinstance(size, int) for size in sizes)
    return leaf is None or isinstance(leaf, (int, float, bool, torch.Size, torch.dtype))


def _fresh(val: Any) -> Any:
    """A new fake tensor like one of Dynamo's. Dynamo still uses its own, which must not change."""
    if not isinstance(val, FakeTensor) or val.layout != torch.strided:
        return val
    with guards_suppressed(val):
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


class _ImpureError(Exception):
    """A node called an op that is no function of its inputs. The op did not run."""


class _Recorder(TorchDispatchMode):
    """Stops a call at the first ATen op that is no function, and notes whether any op computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_computed = False
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Ops of `prim` ask for a device or a layout, and compute no values.
        if func.namespace != "prim" and (why := _impurity(func)):
            raise _ImpureError(why)
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and not _is_view(func):
            self.is_computed = True
            # An op that takes rows of a table reads only these rows.
            read = _nbytes(result) if func in _GATHERS else _nbytes((args, kwargs))
            self.moved += read + _nbytes(result)
        return result


def _impurity(op: torch._ops.OpOverload) -> str:
    name = op.name()
    if op.namespace not in _KNOWN:
        return f"{name} is an op of another library, which may depend on more than its inputs"
    if torch.Tag.nondeterministic_seeded in op.tags:
        return f"{name} draws random numbers"
    if op._schema.is_mutable:
        return f"{name} writes into a tensor"
    if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
        return f"{name} depends on the values, not only on the shapes"
    return ""


def _nbytes(values: Any) -> int:
    leaves = pytree.tree_leaves(values)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _is_view(op: torch._ops.OpOverload) -> bool:
    return op.is_view or op.name() == "aten::lift_fresh"

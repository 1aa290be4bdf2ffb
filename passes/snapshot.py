"""A graph as it was, to go back to when a pass fails half-way.

Inductor holds on to the graph object, so `restore` fills the same object again.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.graph import _Namespace


@dataclass(frozen=True)
class Snapshot:
    """A copy of a graph's nodes, their metadata and its result."""

    copy: fx.Graph
    result: Any
    output_meta: dict[str, Any]

    @staticmethod
    def of(graph: fx.Graph) -> "Snapshot":
        copy = fx.Graph()
        result = copy.graph_copy(graph, {})
        return Snapshot(copy, result, dict(graph.output_node().meta))

    def restore(self, graph: fx.Graph) -> None:
        """Make `graph` what it was, with new node objects under the old names."""
        for node in reversed(graph.nodes):
            node.replace_all_uses_with(None) if node.users else None
            graph.erase_node(node)
        graph._graph_namespace = _Namespace()
        values: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.copy, values)
        output = graph.output(fx.node.map_arg(self.result, lambda n: values[n]))
        output.meta.update(self.output_meta)

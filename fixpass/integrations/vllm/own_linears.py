"""Says on the report which linear layers vLLM computes by its own kernels on CPU.

vLLM packs the weights of such a layer when it loads them, so no other kernel can read them. The
layers stay as they are. Layers that vLLM leaves to torch are matmuls, which `select-linear-kernel`
reports.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import (
    auto_functionalized,
    auto_functionalized_v2,
)

from fixpass.passes.base import Pass, PassResult

NAMESPACE = "_C"
LINEARS = (
    "onednn_mm",
    "onednn_scaled_mm",
    "weight_packed_linear",
    "int8_scaled_mm_with_quant",
    "fp8_scaled_mm_cpu",
    "fp8_scaled_mm_with_quant",
    "int4_scaled_mm_cpu",
    "cpu_gemm_wna16",
)


@dataclass(frozen=True)
class KeepVllmLinears(Pass):
    """One remark for each of vLLM's linear kernels in the graph, which stays as it is."""

    name: ClassVar[str] = "keep-vllm-linears"

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        found: dict[str, fx.Node] = {}
        layers: Counter[str] = Counter()
        for node in graph.nodes:
            name = _name(node)
            if name in LINEARS:
                found.setdefault(name, node)
                layers[name] += 1
        for name, node in found.items():
            count = f"{layers[name]} linear layer{'s' * (layers[name] > 1)}"
            text = f"vLLM's own {NAMESPACE}::{name} computes {count}: it has packed their weights"
            result.missed(node, text)


def _name(node: fx.Node) -> str:
    """The name of the op of vLLM's library that a node calls, functionalised or not."""
    is_wrapped = node.target in (auto_functionalized, auto_functionalized_v2)
    target: Any = node.args[0] if is_wrapped else node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return ""
    return target._schema.name.removeprefix(f"{NAMESPACE}::")

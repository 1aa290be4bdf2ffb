"""Synthetic ATen graphs of any size: one RMSNorm in each 20 nodes, half with a residual add.

The nodes are what a bfloat16 decoder leaves after decomposition: norm, matmul, activation, views.
Each node records its own fake tensor, as a traced graph does. The graphs are not meant to run.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
NODES_A_NORM = 20
NUM_ROWS, HIDDEN_SIZE, HEADS, EPS = 64, 256, 4, 1e-6


@dataclass
class _Builder:
    """A graph in the making; every node gets the value that its call has on fake tensors."""

    mode: FakeTensorMode
    graph: fx.Graph = field(default_factory=fx.Graph)

    def input(self, name: str, val: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = val
        return node

    def parameter(self, name: str, *shape: int | torch.SymInt) -> fx.Node:
        with self.mode:
            return self.input(name, torch.empty(shape, dtype=torch.bfloat16))

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node


def build_graph(num_nodes: int, *, dynamic: bool = False) -> fx.Graph:
    """A graph of about `num_nodes` nodes; dynamic: its number of rows is a symbol."""
    call = _Builder(FakeTensorMode(shape_env=ShapeEnv() if dynamic else None))
    rows: Any = call.input("num_rows", _symbol(call.mode)) if dynamic else NUM_ROWS
    size = rows.meta["val"] if dynamic else rows
    x, residual = (call.parameter(name, size, HIDDEN_SIZE) for name in ("x", "residual"))
    blocks = range(num_nodes // NODES_A_NORM)
    weights = [
        (
            call.parameter(f"norm_weight_{i}", HIDDEN_SIZE),
            call.parameter(f"weight_{i}", HIDDEN_SIZE, HIDDEN_SIZE),
        )
        for i in blocks
    ]
    for i in blocks:
        norm_weight, weight = weights[i]
        if i % 2 == 0:
            x = residual = call(aten.add.Tensor, x, residual)
        x = _norm(call, x, norm_weight)
        x = _filler(call, call(aten.mm.default, x, weight), rows)
        if i % 2:
            x = call(aten.neg.default, x)
    call.graph.output((call(aten.add.Tensor, x, residual),))
    return call.graph


def _norm(call: _Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
    """Eight nodes: RMSNorm as Llama and Qwen write it."""
    h = call(CONVERT, x, torch.float32)
    variance = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, h, 2), [-1], True)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, EPS))
    h = call(CONVERT, call(aten.mul.Tensor, h, scale), torch.bfloat16)
    return call(aten.mul.Tensor, weight, h)


def _filler(call: _Builder, x: fx.Node, rows: Any) -> fx.Node:
    """Eight nodes: SiLU in float32, then heads back and forth."""
    h = call(CONVERT, x, torch.float32)
    h = call(aten.mul.Tensor, h, call(aten.sigmoid.default, h))
    h = call(CONVERT, h, torch.bfloat16)
    h = call(aten.view.default, h, [rows, HEADS, HIDDEN_SIZE // HEADS])
    h = call(aten.permute.default, call(aten.permute.default, h, [1, 0, 2]), [1, 0, 2])
    return call(aten.view.default, h, [rows, HIDDEN_SIZE])


def _symbol(mode: FakeTensorMode) -> torch.SymInt:
    env, source = mode.shape_env, ConstantSource("num_rows")
    assert env is not None
    symbol = env.create_symbol(NUM_ROWS, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=NUM_ROWS, source=source)
    assert isinstance(size, torch.SymInt)
    return size

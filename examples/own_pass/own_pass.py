"""A package with a pass of its own: `clamp-to-relu` turns `x.clamp(min=0)` into `relu(x)`.

    pip install examples/own_pass
    python -m own_pass

The entry point of the group `fixpass.passes` in pyproject.toml makes fixpass find the pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import fixpass

aten = torch.ops.aten


class ClampOfZero(fixpass.Rewrite):
    anchors = (aten.clamp_min.default,)

    def match(self, anchor: fx.Node) -> fixpass.Match | fixpass.Missed:
        minimum = anchor.args[1]
        if minimum != 0:
            return fixpass.Missed(f"the minimum is {minimum}, and relu needs 0")
        return fixpass.Match((anchor,), "became relu")

    def replace(self, graph: fx.Graph, match: fixpass.Match) -> tuple[fx.Node, ...]:
        (clamp,) = match.replaced
        return (fixpass.Editor(graph, clamp).call(aten.relu.default, (clamp.args[0],)),)


@dataclass(frozen=True)
class ClampToRelu(fixpass.Pass):
    """Clamps at zero become relu."""

    name: ClassVar[str] = "clamp-to-relu"

    def run(self, graph: fx.Graph, result: fixpass.PassResult) -> None:
        fixpass.apply_rewrite(graph, ClampOfZero(), result)


def clamps(x: Tensor) -> Tensor:
    return x.clamp(min=0) + x.clamp(min=2)


def main() -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(fixpass.compile(clamps, lower="eager")(x), clamps(x))
    print(fixpass.explain(clamps, x))


if __name__ == "__main__":
    main()

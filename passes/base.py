"""What a pass is, and what it says: Pass, PassResult, Remark.

A pass is a frozen dataclass whose fields are its options. It rewrites one graph in place and
leaves a remark for each thing it did or declined to do. It reads no environment and no device.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import fx

from fixpass.lowering.target import FALLBACK
from fixpass.passes.source_lines import SourceLine, source_lines

Kind = Literal["applied", "missed", "failed"]


JOINED_MODULES = "fixpass_joined"
"""The key of a node's metadata for the modules of the norms that the node computes together."""


@dataclass(frozen=True)
class Choice:
    """The kernel that a site got. Reports count launches and copies from it."""

    kernel: str
    launches: int = 0
    """Launches that the choice adds to the graph; negative where it joins several."""
    first_launches: int = 0
    """Launches with the target's first kernel, with the copies that this kernel needs."""
    is_strided: bool = False
    """The kernel's first operand is not dense."""
    copied: tuple[str, ...] = ()
    """The operands that are copied for the kernel."""
    sites: tuple[str, ...] = ()
    """The modules of the norms that became one; empty for a site of its own."""

    @property
    def num_norms(self) -> int:
        """The norms that the kernel computes."""
        return max(1, len(self.sites))


@dataclass(frozen=True)
class Remark:
    """One thing that a pass did (`applied`), declined to do (`missed`) or could not (`failed`)."""

    pass_name: str
    kind: Kind
    node: str
    text: str
    where: str = ""
    bytes_saved: int = 0
    stack: tuple[SourceLine, ...] = ()
    """The calls of the model that lead to the node, outermost first. The last is its line."""

    choice: Choice | None = None
    """The kernel that the site got, where the pass chose one."""

    @property
    def line(self) -> SourceLine | None:
        """The line of the model, or None where Dynamo recorded none."""
        return self.stack[-1] if self.stack else None

    @property
    def same_code(self) -> bool:
        """Whether the compiled code is the same as without this change: Inductor has the site."""
        return self.choice is not None and self.choice.kernel == FALLBACK

    def __str__(self) -> str:
        return f"{self.kind:<7} {self.node}: {self.text}"


@dataclass
class PassResult:
    """The remarks of one run of one pass, and whether the graph changed.

    `fuel` is what is left of the pipeline's fuel: a pass asks `take_fuel()` before each change.
    """

    pass_name: str
    changed: bool = False
    remarks: list[Remark] = field(default_factory=list)
    fuel: Callable[[], bool] = lambda: True

    def applied(
        self, node: fx.Node, text: str, *, bytes_saved: int = 0, choice: Choice | None = None
    ) -> None:
        self.changed = True
        self._add("applied", node, text, bytes_saved, choice)

    def missed(self, node: fx.Node, why: str) -> None:
        self._add("missed", node, why)

    def failed(self, node: fx.Node, why: str) -> None:
        self._add("failed", node, why)

    def take_fuel(self) -> bool:
        """Whether one more change may be made; asking for it spends it."""
        return self.fuel()

    def _add(
        self,
        kind: Kind,
        node: fx.Node,
        text: str,
        bytes_saved: int = 0,
        choice: Choice | None = None,
    ) -> None:
        where, stack = module_path(node), source_lines(node)
        self.remarks.append(
            Remark(self.pass_name, kind, node.name, text, where, bytes_saved, stack, choice)
        )


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a whole graph. Subclasses are frozen dataclasses with a kebab-case `name`."""

    name: ClassVar[str]
    after: ClassVar[str] = ""
    """The pass behind which a third party's pass runs; empty: behind all of ours."""
    before: ClassVar[str] = ""
    """The pass in front of which a third party's pass runs; empty: no such pass."""

    def cache_key(self) -> str | None:
        """A cache key for the pass's behaviour; None: the key is made of its source and options.

        Give a pass this method where an option or a helper has no source and no values to hash,
        such as an open file. A graph that such a pass rewrote is not cached without it.
        """
        return None

    @abstractmethod
    def run(self, graph: fx.Graph, result: PassResult) -> None:
        """Rewrite `graph` in place; the graph is valid before and must be valid after."""


def module_path(node: fx.Node) -> str:
    """The module that the node came from, such as `model.layers.0.self_attn.q_norm`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return plain_path(str(list(stack.values())[-1][0]))


def plain_path(path: str) -> str:
    """`layers.0` for `L['self']._modules['layers']._modules['0']`, as Dynamo calls a module."""
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    return re.sub(r"^L\['\w+'\]\.?", "", path)

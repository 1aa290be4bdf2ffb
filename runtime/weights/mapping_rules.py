"""The rules of a `Mapping`: renames, stacks, experts, pipeline stages and tensor parallelism.

`mapping` applies them to the names of a checkpoint.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Rename:
    """`old` becomes `new`: at the start of a name, at its end, inside it, or as an expression.

    A `new` of None drops the tensor.
    """

    old: str
    new: str | None
    where: Literal["prefix", "suffix", "inside", "regex"] = "prefix"

    def apply(self, name: str) -> str | None:
        """The new name, the same one where nothing matches, or None where the tensor is dropped."""
        pattern = re.escape(self.old) if self.where != "regex" else self.old
        pattern = {"prefix": f"^{pattern}", "suffix": f"{pattern}$"}.get(self.where, pattern)
        if self.new is None:
            return None if re.search(pattern, name) else name
        new = self.new
        return re.sub(pattern, new if self.where == "regex" else lambda _: new, name)


@dataclass(frozen=True)
class Stacked:
    """Modules `parts` of a checkpoint are one module `into` of the model, joined along `dim`.

    `shards` are what the parameter's own weight_loader calls the parts; numbers by default.
    """

    into: str
    parts: tuple[str, ...]
    shards: tuple[str | int, ...] = ()
    dim: int = 0


@dataclass(frozen=True)
class ExpertPart:
    """A matrix of each expert, and the parameter of the container that holds it for all of them.

    `into` may have `{leaf}` for the last part of the stored name. Without it the weight goes to
    `into`, and any other leaf, such as a scale, to `into_leaf`. `half` is (which, of how many)
    where matrices are joined. `shard` is what the parameter's own weight_loader calls it.
    """

    stored: str
    into: str
    shard: str
    half: tuple[int, int] = (0, 1)

    def target(self, leaf: str) -> str:
        """The name of the parameter for a leaf, `weight` or other."""
        if "{leaf}" in self.into:
            return self.into.replace("{leaf}", leaf)
        return self.into if leaf == "weight" else f"{self.into}_{leaf}"

    def leaf(self, target: str) -> str | None:
        """The leaf whose target this is; None where it is the target of another part."""
        before, braces, behind = self.into.partition("{leaf}")
        if not braces and target == before:
            return "weight"
        before = before if braces else f"{before}_"
        if len(target) <= len(before + behind) or not target.startswith(before):
            return None
        return target[len(before) : len(target) - len(behind)] if target.endswith(behind) else None


@dataclass(frozen=True)
class Experts:
    """Names `<container>.<index>.<part>.<leaf>`; the first dimension of a target is the index.

    The rule works in both directions: a stored tensor that holds all experts is split where the
    model has a parameter for each of them, under its index on this rank.

    `first` and `count` are the experts that this rank holds; a count of None is all of them.
    """

    parts: tuple[ExpertPart, ...]
    container: str = "experts"
    first: int = 0
    count: int | None = None

    def local(self, index: int) -> int | None:
        """The index on this rank; None for an expert of another rank."""
        here = index - self.first
        mine = self.count is None or 0 <= here < self.count
        return here if mine else None


@dataclass(frozen=True)
class Stage:
    """The layers that a pipeline stage holds, found by names in `containers`."""

    layers: range
    containers: tuple[str, ...] = ("layers", "blocks", "h")
    is_first: bool = False
    is_last: bool = False
    first_only: tuple[str, ...] = ("embed_tokens", "wte")
    last_only: tuple[str, ...] = ("model.norm", "norm_f", "lm_head")

    def holds(self, name: str) -> bool:
        """Whether this stage has the tensor."""
        parts = name.split(".")
        for container, index in pairwise(parts):
            if container in self.containers and index.isdigit():
                return int(index) in self.layers
        dotted = f".{name}."
        if any(f".{module}." in dotted for module in self.first_only):
            return self.is_first
        if any(f".{module}." in dotted for module in self.last_only):
            return self.is_last
        return True


@dataclass(frozen=True)
class TensorParallel:
    """Plain parameters that hold one rank's slice: patterns of their names, and along which dim."""

    rank: int
    size: int
    dims: tuple[tuple[str, int], ...]

    def dim(self, target: str) -> int | None:
        """The dimension of `target` that is sliced, of its full shape; None where none is."""
        return next((dim for pattern, dim in self.dims if fnmatchcase(target, pattern)), None)


QKV = Stacked("qkv_proj", ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
GATE_UP = Stacked("gate_up_proj", ("gate_proj", "up_proj"))

# The experts of transformers: `gate_up_proj` and `down_proj`, one parameter for all experts.
GATED_EXPERTS = Experts(
    (
        ExpertPart("gate_proj", "gate_up_proj", "w1", (0, 2)),
        ExpertPart("up_proj", "gate_up_proj", "w3", (1, 2)),
        ExpertPart("down_proj", "down_proj", "w2"),
    )
)
MIXTRAL_EXPERTS = Experts(
    (
        ExpertPart("w1", "gate_up_proj", "w1", (0, 2)),
        ExpertPart("w3", "gate_up_proj", "w3", (1, 2)),
        ExpertPart("w2", "down_proj", "w2"),
    )
)
# NemotronH: no gate.
PLAIN_EXPERTS = Experts(
    (ExpertPart("up_proj", "up_proj", "w1"), ExpertPart("down_proj", "down_proj", "w2"))
)
# The experts of serving engines: `w13_weight`, `w2_weight`, `w13_input_scale` and so on.
FUSED_EXPERTS = Experts(
    (
        ExpertPart("gate_proj", "w13_{leaf}", "w1", (0, 2)),
        ExpertPart("up_proj", "w13_{leaf}", "w3", (1, 2)),
        ExpertPart("down_proj", "w2_{leaf}", "w2"),
    )
)

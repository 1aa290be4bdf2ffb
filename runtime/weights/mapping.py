"""Which parameter takes a stored tensor: a Mapping, which is data.

A checkpoint stores q, k and v, or each expert, by itself; a model holds them in one parameter.
`candidates` turns a stored name into the parameters that may take it, the most specific first.
Whether one of them exists, and whether shapes fit, is not known here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

Branch = Literal["filter", "stage", "scale", "stacked", "expert", "tied", "default"]


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


@dataclass(frozen=True)
class Experts:
    """Names `<container>.<index>.<part>.<leaf>`; the first dimension of a target is the index.

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
    """The layers that a pipeline stage holds, under whatever the containers are called."""

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


class Candidate(NamedTuple):
    """A parameter that may take a stored tensor, and the part of it that the tensor fills."""

    branch: Branch
    target: str
    shard: str | int | None = None
    expert: int | None = None
    part: tuple[int, int] = (0, 1)
    """(which, of how many) along `dim`."""
    dim: int = 0
    """Counted without the dimension of experts."""


@dataclass(frozen=True)
class Dropped:
    """A tensor that is not for this model or rank, and why."""

    branch: Branch
    target: str
    why: str


@dataclass(frozen=True)
class Mapping:
    """How names of a checkpoint become parameters of a model; empty where they are the same.

    Applied in this order: renames, filters (patterns to drop), scale_renames, stage, then stacked
    and experts. `scales` are the names of parameters that scale a weight: one that the model does
    not have is skipped, and one that the model has must be loaded.
    """

    renames: tuple[Rename, ...] = ()
    filters: tuple[str, ...] = ()
    scale_renames: tuple[Rename, ...] = ()
    stage: Stage | None = None
    stacked: tuple[Stacked, ...] = ()
    experts: tuple[Experts, ...] = ()
    tensor_parallel: TensorParallel | None = None
    scales: tuple[str, ...] = field(
        default=(
            "*_scale",
            "*_scale_inv",
            "*_scale_2",
            "scale",
            "scales",
            "*_scales",
            "*_zero_point",
        )
    )

    def is_scale(self, name: str) -> bool:
        """Whether a name is that of a scale."""
        leaf = name.rpartition(".")[2]
        return any(fnmatchcase(leaf, pattern) for pattern in self.scales)

    @cached_property
    def keeps_names(self) -> bool:
        """Whether every stored tensor goes to the parameter of its own name, as a whole."""
        return replace(self, scales=SAME_NAMES.scales) == SAME_NAMES

    def candidates(self, name: str) -> tuple[Candidate, ...] | Dropped:
        """The parameters that may take the stored tensor `name`, the most specific first."""
        if self.keeps_names:
            return (Candidate("default", name),)
        renamed = _rename(self.renames, name)
        if renamed is None:
            return Dropped("filter", name, "a rename drops it")
        if any(fnmatchcase(renamed, pattern) for pattern in self.filters):
            return Dropped("filter", renamed, "a filter drops it")
        if self.scale_renames and self.is_scale(renamed):
            scale = _rename(self.scale_renames, renamed)
            if scale is None:
                return Dropped("scale", renamed, "a scale rename drops it")
            renamed = scale
        if self.stage is not None and not self.stage.holds(renamed):
            return Dropped("stage", renamed, "another pipeline stage holds it")
        experts = self._experts(renamed)
        if isinstance(experts, Dropped):
            return experts
        return (*experts, *self._stacked(renamed), Candidate("default", renamed))

    def _stacked(self, name: str) -> Iterator[Candidate]:
        parts = name.split(".")
        for rule in self.stacked:
            for which, part in enumerate(rule.parts):
                if part not in parts:
                    continue
                target = ".".join(rule.into if found == part else found for found in parts)
                shard = rule.shards[which] if rule.shards else which
                place = (which, len(rule.parts))
                yield Candidate("stacked", target, shard, part=place, dim=rule.dim)

    def _experts(self, name: str) -> tuple[Candidate, ...] | Dropped:
        if not self.experts:
            return ()
        found: list[Candidate] = []
        for rule in self.experts:
            match = _expert_name(rule.container).match(name)
            if match is None:
                continue
            index = rule.local(int(match["index"]))
            for part in rule.parts:
                if part.stored != match["part"]:
                    continue
                target = f"{match['prefix']}{rule.container}.{part.target(match['leaf'])}"
                if index is None:
                    return Dropped("expert", target, "another rank holds this expert")
                found.append(Candidate("expert", target, part.shard, index, part.half))
        return tuple(found)


@cache
def _expert_name(container: str) -> re.Pattern[str]:
    escaped = re.escape(container)
    return re.compile(
        rf"(?P<prefix>(?:.*\.)?){escaped}\.(?P<index>\d+)\.(?P<part>\w+)\.(?P<leaf>.+)$"
    )


def _rename(renames: tuple[Rename, ...], name: str) -> str | None:
    for rename in renames:
        renamed = rename.apply(name)
        if renamed is None:
            return None
        name = renamed
    return name


SAME_NAMES = Mapping()

# Parts of mappings that many models share.

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

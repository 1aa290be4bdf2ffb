"""`Mapping`: turns a stored name into names of parameters that may take it, and the part of each.

A checkpoint stores q, k and v, or each expert, by itself; a model holds them in one parameter.
`candidates` turns a stored name into the parameters that may take it, the most specific first.
Whether one of them exists, and whether shapes fit, is not known here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Literal, NamedTuple

from fixpass.runtime.weights.mapping_rules import Experts, Rename, Stacked, Stage, TensorParallel

Branch = Literal["filter", "stage", "scale", "stacked", "expert", "tied", "default"]


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
    entry: int | None = None
    """The entry of the stored tensor's first dimension that it takes; None for the whole tensor."""
    half: tuple[int, int] = (0, 1)
    """(which, of how many) of that entry, along its first dimension."""
    transposed: bool = False
    """Whether the last two dimensions of the stored tensor are exchanged first."""
    broadcast: bool = False
    """Whether a single stored value fills all of its part."""


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
    not have is skipped, and one that the model has must be loaded. `transposed` are patterns of
    renamed tensors that are stored with their last two dimensions exchanged: a square one does not
    show it. `broadcast` are patterns of parameters that a single stored value fills.
    """

    renames: tuple[Rename, ...] = ()
    filters: tuple[str, ...] = ()
    scale_renames: tuple[Rename, ...] = ()
    stage: Stage | None = None
    stacked: tuple[Stacked, ...] = ()
    experts: tuple[Experts, ...] = ()
    tensor_parallel: TensorParallel | None = None
    transposed: tuple[str, ...] = ()
    broadcast: tuple[str, ...] = ()
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
        return _matches(name.rpartition(".")[2], self.scales)

    @cached_property
    def keeps_names(self) -> bool:
        """Whether every stored tensor goes to the parameter of its own name, as a whole."""
        return replace(self, scales=SAME_NAMES.scales) == SAME_NAMES

    def candidates(self, name: str) -> tuple[Candidate, ...] | Dropped:
        """The parameters that may take the stored tensor `name`, the most specific first."""
        if self.keeps_names:
            return (Candidate("default", name),)
        renamed = self._renamed(name)
        if isinstance(renamed, Dropped):
            return renamed
        experts = self._experts(renamed)
        if isinstance(experts, Dropped):
            return experts
        found = (*experts, *self._stacked(renamed), Candidate("default", renamed))
        return tuple(self._marked(candidate, renamed) for candidate in found)

    def entries(self, name: str, count: int) -> Iterator[list[Candidate]]:
        """The parameters that each take one expert of the stored tensor `name`, for each part."""
        renamed = self._renamed(name)
        if isinstance(renamed, Dropped):
            return
        for rule in self.experts:
            if (match := _stacked_name(rule.container).match(renamed)) is None:
                continue
            leaves = [(part, part.leaf(match["rest"])) for part in rule.parts]
            ways = [(f"{p.stored}.{leaf}", p.shard, p.half) for p, leaf in leaves if leaf]
            indices = [(i, at) for i in range(count) if (at := rule.local(i)) is not None]
            for rest, shard, half in (*ways, (match["rest"], None, (0, 1))):
                yield [
                    self._marked(Candidate("expert", target, shard, entry=i, half=half), renamed)
                    for i, at in indices
                    if (target := f"{match['prefix']}{rule.container}.{at}.{rest}")
                ]

    def _marked(self, candidate: Candidate, renamed: str) -> Candidate:
        if not (self.transposed or self.broadcast):
            return candidate
        return candidate._replace(
            transposed=_matches(renamed, self.transposed),
            broadcast=_matches(candidate.target, self.broadcast),
        )

    def _renamed(self, name: str) -> str | Dropped:
        renamed = _rename(self.renames, name)
        if renamed is None:
            return Dropped("filter", name, "a rename drops it")
        if _matches(renamed, self.filters):
            return Dropped("filter", renamed, "a filter drops it")
        if self.scale_renames and self.is_scale(renamed):
            scale = _rename(self.scale_renames, renamed)
            if scale is None:
                return Dropped("scale", renamed, "a scale rename drops it")
            renamed = scale
        if self.stage is not None and not self.stage.holds(renamed):
            return Dropped("stage", renamed, "another pipeline stage holds it")
        return renamed

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


@cache
def _stacked_name(container: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<prefix>(?:.*\.)?){re.escape(container)}\.(?P<rest>\D.*)$")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _rename(renames: tuple[Rename, ...], name: str) -> str | None:
    for rename in renames:
        renamed = rename.apply(name)
        if renamed is None:
            return None
        name = renamed
    return name


SAME_NAMES = Mapping()

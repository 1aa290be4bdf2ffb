"""Shard conditions: which modules of a model FSDP2 shards as units.

A condition is asked for each module with its dotted name. Names are compared part by part, never
by their ends: `endswith("norm")` is true of every norm of a block. Nothing is sharded here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import nn

from fixpass.runtime.errors import ShardingError
from fixpass.runtime.modules import find_attr

Condition = Callable[[str, nn.Module], bool]
"""Whether a module, given by its dotted name and itself, is a unit."""
Rule = Literal["explicit", "block-class", "common-numbered-block"]

BLOCK_CONTAINERS = (
    "blocks",
    "layers",
    "double_blocks",
    "single_blocks",
    "refiner_blocks",
    "noise_refiner",
    "context_refiner",
    "transformer_blocks",
    "single_transformer_blocks",
)
"""Names of modules in which models number their blocks."""


def entry_of(*containers: str) -> Condition:
    """The condition of being a numbered child of a module called as one of `containers`.

    Example:
        `entry_of("blocks")("model.blocks.0", block)` is true, of "model.blocks.0.norm" it is false.

    """

    def condition(name: str, module: nn.Module) -> bool:
        *_, container, index = ("", "", *name.split("."))
        return index.isdigit() and container in containers

    return condition


def numbered_within(*containers: str) -> Condition:
    """The condition of being a numbered child anywhere inside one of `containers`."""

    def condition(name: str, module: nn.Module) -> bool:
        *path, index = name.split(".")
        return index.isdigit() and not set(path).isdisjoint(containers)

    return condition


def named(last: str) -> Condition:
    """The condition of being called `last` outside numbered blocks."""

    def condition(name: str, module: nn.Module) -> bool:
        *path, found = name.split(".")
        return found == last and not any(part.isdigit() for part in path)

    return condition


def class_named(names: Iterable[str]) -> Condition:
    """The condition that the name of the module's class is one of `names`."""
    names = frozenset(names)

    def condition(name: str, module: nn.Module) -> bool:
        return type(module).__name__ in names

    return condition


def any_of(*conditions: Condition) -> Condition:
    """The condition that one of the conditions holds."""

    def condition(name: str, module: nn.Module) -> bool:
        return any(holds(name, module) for holds in conditions)

    return condition


CONDITIONS: dict[str, Condition] = {
    "is_layer": entry_of("layers"),
    "is_block": entry_of("blocks"),
    "is_t5_block": entry_of("block"),
    "is_transformer_block": entry_of("transformer_blocks"),
    "is_double_block": entry_of("double_blocks"),
    "is_single_block": entry_of("single_blocks"),
    "is_refiner_block": entry_of("refiner_blocks"),
    "is_blocks_or_double_blocks": entry_of("blocks", "double_blocks"),
    "is_blocks_or_transformer_blocks": entry_of("blocks", "transformer_blocks"),
    "is_zimage_layer": numbered_within("layers", "noise_refiner", "context_refiner"),
    "is_embed_tokens": named("embed_tokens"),
    "is_embeddings": named("embeddings"),
    "is_shared": named("shared"),
    "is_final_norm": named("norm"),
    "is_final_layer_norm": named("final_layer_norm"),
    "is_txt_in": named("txt_in"),
}
"""Conditions by the names that serving engines give them."""

ENCODERS: dict[str, tuple[Condition, ...]] = {
    "text": tuple(CONDITIONS[name] for name in ("is_layer", "is_embed_tokens", "is_final_norm")),
    "clip": tuple(CONDITIONS[name] for name in ("is_layer", "is_embeddings")),
    "t5": tuple(CONDITIONS[name] for name in ("is_t5_block", "is_shared", "is_final_layer_norm")),
}
"""The conditions of text encoders, by kind: the blocks, the embedding and the final norm."""


def resolve_shard_conditions(
    model: nn.Module, conditions: Sequence[Condition] | None = None
) -> tuple[tuple[Condition, ...], Rule]:
    """The conditions for a model, and the rule that gave them.

    Given conditions come first. Without any, the units are of the classes that the model names in
    `_repeated_blocks` and `_no_split_modules`. Without such a list, they are the numbered children
    of the `BLOCK_CONTAINERS`.
    """
    if conditions:
        return tuple(conditions), "explicit"
    names: set[str] = set()
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        names.update(find_attr(model, attribute, None) or ())
    if names:
        return (class_named(names),), "block-class"
    return (entry_of(*BLOCK_CONTAINERS),), "common-numbered-block"


def shard_units(model: nn.Module, conditions: Sequence[Condition]) -> tuple[str, ...]:
    """The names of the modules to shard, before the root: the outermost that match.

    Skipped are modules without parameters, and those with a parameter that is tied to one outside:
    in a unit of its own it would be tied no longer. Raises ShardingError where nothing is left.
    """
    units: list[str] = []
    holds = any_of(*conditions)
    users = _users(model)
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{unit}.") for unit in units):
            continue
        if holds(name, module) and _can_stand_alone(name, module, users):
            units.append(name)
    if not units:
        found = ", ".join(containers(model)) or "none"
        raise ShardingError(
            f"no module of {type(model).__name__} with parameters of its own matches the shard "
            f"conditions; containers with numbered children: {found}. Pass conditions=, for "
            "instance (entry_of('blocks'),)"
        )
    return tuple(units)


def containers(model: nn.Module) -> list[str]:
    """The modules with numbered children, and how many, as in `encoder.block (2)`."""
    found = []
    for name, module in model.named_modules():
        count = sum(child.isdigit() for child in module._modules)
        if count:
            found.append(f"{name or type(module).__name__} ({count})")
    return found


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, several where it is tied."""
    users: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(param), []).append(name)
    return users


def _can_stand_alone(name: str, module: nn.Module, users: dict[int, list[str]]) -> bool:
    params = list(module.parameters())
    inside = (user.startswith(f"{name}.") for param in params for user in users[id(param)])
    return bool(params) and all(inside)

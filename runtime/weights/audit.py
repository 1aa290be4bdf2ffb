"""Check that post-processing may run after each load: run it twice, and compare all tensors.

The post-processing of an engine runs twice on one model, then an update writes the values that are
there. Each run is compared with the state before it. The model is changed: give it one that is not
in use.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import FixpassError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.census import Census, census
from fixpass.runtime.weights.parameter_layout import logical
from fixpass.runtime.weights.stale import StaleWarning
from fixpass.runtime.weights.targets import local_part, pointers_of, targets, walk
from fixpass.runtime.weights.update import update
from fixpass.runtime.weights.weight_version import fingerprint

Process = Callable[[nn.Module], object]

WHY: Mapping[str, str] = {
    "compounded": "its value changed again when the processing ran again",
    "moved": "its memory moved when the processing ran again: captured graphs read the old one",
    "gone": "the parameter is deleted or hidden: no load reaches it any more",
    "lost": "attributes of the parameter are lost",
    "changed": "its value changed in an update with equal values",
    "refused": "an update with equal values failed",
    "stale": "it follows from weights, and no update refreshes it",
}
"""What can be found, and what that means."""


class Finding(NamedTuple):
    """One fault of post-processing."""

    what: str
    """A key of WHY."""
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what:<11} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Audit:
    """The faults that an audit found; false where there are none."""

    findings: tuple[Finding, ...]
    census: Census
    """The tensors of the model after the first run."""

    def __bool__(self) -> bool:
        return bool(self.findings)

    def of(self, what: str) -> tuple[str, ...]:
        """The names of one kind of finding: a key of WHY."""
        return tuple(finding.name for finding in self.findings if finding.what == what)

    def __str__(self) -> str:
        lines = list(map(str, self.findings))
        return "\n".join(lines or [f"no faults in {len(self.census.entries):,} tensors"])


class _State(NamedTuple):
    """A tensor at one time."""

    tensor: Tensor | float
    words: float
    """A fingerprint of all values; of a number, the number."""
    place: int
    kind: type
    attributes: frozenset[str]


def audit(model: nn.Module, process: Process) -> Audit:
    """Run post-processing twice and an update with equal values, and say what went wrong.

    Args:
        model: a model with loaded weights that is not in use: it is changed.
        process: the post-processing, called with the model, such as a loop over
            `process_weights_after_loading`.

    Returns:
        The findings: values that compound, memory that moves, parameters that are deleted or
        hidden, attributes that are lost, values that an update changes, and tensors that would be
        stale after an update.

    Example:
        >>> print(audit(model, engine.process_weights_after_loading))

    """
    model = unwrapped(model)
    loaded = _states(census(model))
    registered = targets(model)
    first = census(model, process=process)
    once = _states(first)
    found = [*_gone(model, set(registered), once), *_lost(loaded, once)]
    again = _states(census(model, process=process))
    found += _between(once, again, "compounded")
    found += [Finding("moved", *rest) for rest in _moved(once, again)]
    found += [fault for fault in _lost(once, again) if fault not in found]
    try:
        _update_with_equal_values(model)
    except FixpassError as error:
        found.append(Finding("refused", type(model).__name__, str(error)))
    # A declared tensor that the processing has left stale is refreshed by any update.
    declared = {name for entry in first.entries if entry.is_declared for name in entry.names}
    equal = {n: state for n, state in _states(census(model)).items() if n not in declared}
    found += _between(again, equal, "changed")
    found += [Finding("stale", e.names[0], f"{e.relation}; {WHY['stale']}") for e in first.exposed]
    return Audit(tuple(dict.fromkeys(found)), first)


def _states(found: Census) -> dict[str, _State]:
    """All tensors and numbers of a census by each of their names."""
    states = {}
    with torch.no_grad():
        for entry in found.entries:
            state = _state(entry.value)
            states.update(dict.fromkeys(entry.names, state))
    return states


def _state(value: Tensor | float) -> _State:
    if not isinstance(value, Tensor):
        return _State(value, value, 0, float, frozenset())
    plain = local_part(value)
    usable = plain.layout == torch.strided and not plain.is_meta and plain.numel() > 0
    words = fingerprint(plain, 0) if usable else 0
    return _State(value, words, pointers_of([value])[0], type(value), frozenset(vars(value)))


def _gone(model: nn.Module, before: set[str], once: Mapping[str, _State]) -> Iterator[Finding]:
    """Parameters that the processing deleted, and those that a plain tensor hides."""
    now = targets(model)
    for name in sorted(before):
        target = now.get(name)
        if target is None:
            instead = f", and a plain tensor has its name: {WHY['gone']}"
            yield Finding("gone", name, f"deleted{instead if name in once else ''}")
        elif target.leaf in vars(target.module):
            yield Finding("gone", name, f"a plain attribute hides it: {WHY['gone']}")


def _lost(before: Mapping[str, _State], after: Mapping[str, _State]) -> Iterator[Finding]:
    for name, old in before.items():
        new = after.get(name)
        if new is None or not isinstance(old.tensor, nn.Parameter):
            continue
        if lost := sorted(old.attributes - new.attributes):
            yield Finding("lost", name, f"it has no {', '.join(lost)} any more")
        if not issubclass(new.kind, old.kind):
            yield Finding("lost", name, f"its class was {old.kind.__name__}")


def _between(
    before: Mapping[str, _State], after: Mapping[str, _State], what: str
) -> Iterator[Finding]:
    for name, old in before.items():
        new = after.get(name)
        if new is not None and new.words != old.words:
            yield Finding(what, name, WHY[what])


def _moved(before: Mapping[str, _State], after: Mapping[str, _State]) -> Iterator[tuple[str, str]]:
    for name, old in before.items():
        new = after.get(name)
        if new is not None and old.place and new.place != old.place:
            yield name, WHY["moved"]


def _update_with_equal_values(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleWarning)
        with update(model, scope="parameters") as tx:
            for target in walk(model)[0]:
                if not target.tensor.is_meta:
                    tx.load(target.name, logical(target.tensor))

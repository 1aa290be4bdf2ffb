"""Installs hooks in SGLang's registry, and removes those that are in doubt.

SGLang applies hooks after it has called all plugins, and only logs errors. So `install` wraps that
step. Before it, a hook is removed with a warning if its target does not exist or another plugin
hooks the target too. After it, each hook is looked for at its target. The hooks themselves are in
`serving` and `diffusion`.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Literal

from fixpass.integrations import engine

SUPPORTED = (0, 5)
log = logging.getLogger("fixpass")
say_once = engine.once(log)


@dataclass(frozen=True)
class Hook:
    """A function to run after or around one of SGLang's functions."""

    target: str
    """The dotted name of SGLang's function."""
    kind: Literal["AFTER", "AROUND"]
    """SGLang's type of hook."""
    run: Callable[..., Any]
    applies: Callable[[], bool] = lambda: True
    """Whether this process uses the target; the hook of an unused target is left out silently."""


def check_version() -> None:
    """Raise EngineError unless the installed SGLang is one that we know."""
    engine.check_version(importlib.import_module("sglang"), "SGLang", SUPPORTED)


def install(registry: Any, hook_type: Any, hooks: Sequence[Hook]) -> None:
    """Register `hooks`, and check them when the registry applies its hooks."""
    for hook in hooks:
        registry.register(hook.target, hook.run, getattr(hook_type, hook.kind))
    held = registry.__dict__.get("apply_hooks")
    apply = registry.apply_hooks

    def apply_hooks() -> None:
        if held is None:
            del registry.apply_hooks
        else:
            registry.apply_hooks = held
        kept = [hook for hook in hooks if _keeps(registry, hook)]
        apply()
        for hook in kept:
            if not is_in_place(hook):
                say_once(f"the hook of {hook.target} is not in place: SGLang runs without it")

    registry.apply_hooks = staticmethod(apply_hooks)


def _keeps(registry: Any, hook: Hook) -> bool:
    """Whether a hook stays registered; else it is removed, and a warning says why."""
    why = _why_not(registry, hook)
    if why is None:
        return True
    others = [entry for entry in registry._hooks[hook.target] if entry[1] is not hook.run]
    registry._hooks[hook.target] = others
    if not others:
        del registry._hooks[hook.target]
    if why:
        say_once(f"{why}: SGLang runs without the hook of {hook.target}")
    return False


def _why_not(registry: Any, hook: Hook) -> str | None:
    """Why a hook cannot stay; None if it can, and empty if this process does not use its target."""
    try:
        if not hook.applies():
            return ""
        resolved(hook.target)
    except (ImportError, AttributeError, LookupError) as error:
        return f"{hook.target} is not where it was ({error})"
    others = [entry for entry in registry._hooks[hook.target] if entry[1] is not hook.run]
    if others:
        names = ", ".join(str(getattr(source, "plugin_name", "?")) for _, _, source in others)
        return f"another plugin ({names}) hooks {hook.target} too"
    if hook.target in registry._patched:
        return f"{hook.target} was hooked before fixpass came"
    return None


def resolved(target: str) -> Any:
    """The object of a dotted name; AttributeError or ImportError where there is none."""
    first, *rest = target.split(".")
    found: Any = importlib.import_module(first)
    path = first
    for name in rest:
        path = f"{path}.{name}"
        if isinstance(found, ModuleType) and name not in vars(found):
            importlib.import_module(path)
        found = getattr(found, name)
    return found


def is_in_place(hook: Hook) -> bool:
    """Whether a call of the target comes through the hook."""
    found = resolved(hook.target)
    while isinstance(found, FunctionType):
        cells = [cell.cell_contents for cell in found.__closure__ or ()]
        if any(content is hook.run for content in cells):
            return True
        found = found.__dict__.get("__wrapped__")
    return False

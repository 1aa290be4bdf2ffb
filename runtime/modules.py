"""Look through wrappers for what is inside: modules, and attributes of modules.

Wrappers are those of FSDP, of data parallelism, of torch.compile and of torch's activation
checkpoints. A module inside that is merely called `module` is found too, as the wrappers of other
libraries are. Keywords of functions are in `fixpass.modules`.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

# Where wrappers keep the module that they wrap.
INNER = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")

_RAISE = object()


def find_attr(module: object, name: str, default: Any = _RAISE) -> Any:
    """The attribute `name` of a module or of one that it wraps, the outermost that has it.

    Values such as None, 0 and an empty list count as found. Raises AttributeError where no module
    has the attribute, unless there is a default. A wrapper that wraps itself ends the search.
    """
    modules = list(chain(module))
    # The class and the instance come first: a wrapper's own __getattr__ asks the inner module, and
    # never ends where wrappers form a cycle.
    for found in modules:
        if _holds(found, name):
            return getattr(found, name)
    for found in modules:
        if next(inner(found), None) is None:
            try:
                return getattr(found, name)
            except AttributeError:
                continue
    if default is not _RAISE:
        return default
    names = " -> ".join(type(found).__name__ for found in modules)
    raise AttributeError(f"no attribute {name!r} in {names}")


def unwrapped(module: object) -> Any:
    """The module inside all wrappers."""
    *_, last = chain(module)
    return last


def chain(module: object) -> Iterator[object]:
    """A module and those that it wraps, outermost first, each once."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        found = waiting.pop(0)
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting.extend(inner(found))


def inner(module: object) -> Iterator[object]:
    """The modules that a wrapper wraps; none where it is no wrapper."""
    held = vars(module) if isinstance(getattr(module, "__dict__", None), dict) else {}
    children = held.get("_modules", {})
    for name in INNER:
        found = children.get(name, held.get(name))
        if found is None:
            continue
        # Many models have a child called `module` beside others, and are no wrappers.
        if name != "module" or (len(children) <= 1 and not held.get("_parameters")):
            yield found


def _holds(module: object, name: str) -> bool:
    if isinstance(module, nn.Module):
        registered = (module._parameters, module._buffers, module._modules)
        if any(name in names for names in registered):
            return True
    return inspect.getattr_static(module, name, _RAISE) is not _RAISE

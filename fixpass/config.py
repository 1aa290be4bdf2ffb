"""Config: every option of the backend, from `options=` and from `FIXPASS_*` variables.

Only this file reads the environment. An option wins over its variable. An unknown option, an
unknown `FIXPASS_*` variable, or a value that does not parse raises ConfigError.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from fixpass.lowering.contract import Kernel
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass
from fixpass.passes.fold_weights import Mode
from fixpass.passes.pipeline import Verify
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.symmetric_memory.policy import Policy

Check = Callable[[str, Any], Any]
Parse = Callable[[str, str], Any]
_SWITCH, _PREFIX, _TESTS = "FIXPASS", "FIXPASS_", "FIXPASS_TEST_"
_FLAGS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
# Old names and values of options, for one release: the new name, and new values by old value.
_RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "fold": ("fold_weights", {"derived": "cache", "inplace": "restride"}),
    "guards": ("eager_kernels", {}),
}


def _value(is_right: Callable[[Any], bool], expected: str) -> Check:
    def check(label: str, value: Any) -> Any:
        if not is_right(value):
            raise ConfigError(f"{label} is {expected}, not {value!r}")
        return value

    return check


def _sequence_of(kind: type, shown: str) -> Check:
    def check(label: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{label} is a sequence, not {value!r}")
        items = tuple(value)
        for item in items:
            if not isinstance(item, kind):
                raise ConfigError(f"{label}: {item!r} is no {shown}")
        return items

    return check


def _pass_names(label: str, value: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = _sequence_of(str, "name of a pass")(label, value)
    known = pass_names()
    for name in names:
        if name not in known:
            raise ConfigError(f"{label}: unknown {name!r}; known: {', '.join(known)}")
    return names


def _kernel_names(label: str, value: Any) -> tuple[str, ...] | None:
    """The names; `Config.resolve` looks them up when it knows the option `kernels`."""
    return None if value is None else _sequence_of(str, "name of a kernel")(label, value)


def _items(label: str, value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{label} is a mapping of names to values, not {value!r}")
    return tuple(sorted(value.items()))


_IS_FLAG = _value(lambda value: isinstance(value, bool), "True or False")
_IS_VERIFY = _value(
    lambda value: isinstance(value, bool) or value == "values", 'True, False or "values"'
)
_IS_LOWER = _value(lambda value: value in ("inductor", "eager"), '"inductor" or "eager"')
_IS_LINEAR = _value(lambda value: value in ("auto", "inductor"), '"auto" or "inductor"')
_IS_MODE = _value(
    lambda value: value in ("cache", "restride", "off", None), '"cache", "restride" or "off"'
)
_IS_COUNT = _value(
    lambda value: value is None or (type(value) is int and value >= 0),
    "a number of changes or None",
)
_IS_DURATION = _value(
    lambda value: type(value) in (int, float) and value > 0, "a number of seconds above 0"
)
_IS_POLICY = _value(lambda value: isinstance(value, (bool, Policy)), "True, False or a Policy")


def _flag(variable: str, text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ConfigError(f"{variable}={text!r}: say one of {', '.join(_FLAGS)}")
    return _FLAGS[text.lower()]


def _verify(variable: str, text: str) -> Verify:
    return "values" if text == "values" else _flag(variable, text)


def _number(variable: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{variable}={text!r} is not a number")
    return int(text)


def _seconds(variable: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{variable}={text!r} is not a number of seconds") from None


def _word(_: str, text: str) -> str:
    return text


def _words(_: str, text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _facts(check: Check, parse: Parse | None = None, variable: str = "") -> dict[str, Any]:
    """The metadata of a field of Config.

    Args:
        check: gives the value that Config keeps, or raises ConfigError.
        parse: reads the text of the variable.
        variable: the name of the variable. An option that holds objects has none.
    """
    return {"check": check, "parse": parse, "variable": variable}


@dataclass(frozen=True)
class Config:
    """The options of `torch.compile(model, backend="fixpass", options={...})`."""

    strict: bool = field(default=False, metadata=_facts(_IS_FLAG, _flag, "FIXPASS_STRICT"))
    """Raise where a pass fails, instead of compiling without it and saying so on the report."""
    verify: Verify = field(default=False, metadata=_facts(_IS_VERIFY, _verify, "FIXPASS_VERIFY"))
    """Check the graph after every pass on fake tensors, with exact strides. "values" also runs the
    graph on random inputs and compares numbers."""
    lower: str = field(default="inductor", metadata=_facts(_IS_LOWER, _word, "FIXPASS_LOWER"))
    """"inductor" compiles; "eager" runs the rewritten graph op by op, for debugging."""
    norm_kernels: tuple[str, ...] | None = field(
        default=None, metadata=_facts(_kernel_names, _words, "FIXPASS_NORM_KERNELS")
    )
    """Norm kernels in order of preference, in place of the target's own order."""
    disable: tuple[str, ...] = field(
        default=(), metadata=_facts(_pass_names, _words, "FIXPASS_DISABLE")
    )
    """Names of passes to leave out."""
    fuel: int | None = field(default=None, metadata=_facts(_IS_COUNT, _number, "FIXPASS_FUEL"))
    """Stop rewriting after this many changes, to bisect a wrong result."""
    passes: tuple[Pass, ...] = field(
        default=(), metadata=_facts(_sequence_of(Pass, "instance of fixpass.Pass"))
    )
    """Passes of your own. They run after ours, or where their `after` and `before` say."""
    kernels: tuple[Kernel, ...] = field(
        default=(), metadata=_facts(_sequence_of(Kernel, "instance of fixpass.Kernel"))
    )
    """Kernels of your own, to be named in `norm_kernels` or in a target."""
    targets: tuple[Target, ...] = field(
        default=(), metadata=_facts(_sequence_of(Target, "instance of fixpass.Target"))
    )
    """Targets of your own; they win over ours of the same name."""
    symmetric_memory: bool | Policy = field(
        default=True, metadata=_facts(_IS_POLICY, _flag, "FIXPASS_SYMMETRIC_MEMORY")
    )
    """All-reduces in symmetric memory: on, off, or on under a policy of your own."""
    symmetric_timeout: float = field(
        default=30.0, metadata=_facts(_IS_DURATION, _seconds, "FIXPASS_SYMMETRIC_TIMEOUT")
    )
    """Seconds that a rank waits for the others in an all-reduce before it raises."""
    eager_kernels: bool = field(
        default=True, metadata=_facts(_IS_FLAG, _flag, "FIXPASS_EAGER_KERNELS")
    )
    """Lay operands out for opaque norm kernels that engines call outside compiled graphs."""
    fold_weights: Mode | None = field(
        default=None,
        metadata=_facts(_IS_MODE, _word, "FIXPASS_FOLD_WEIGHTS"),
    )
    """Weight-only subgraphs: "cache" keeps their values beside the weights. "restride" changes the
    strides of the weights themselves where that is safe. "off" leaves the subgraphs in the graph.
    None is "cache" for weights on CPU, and "off" for others."""
    linear: str = field(default="auto", metadata=_facts(_IS_LINEAR, _word, "FIXPASS_LINEAR"))
    """Linear layers on CPU: "auto" calls `skinny_linear` for few rows, "inductor" never does."""
    inductor: tuple[tuple[str, Any], ...] = field(default=(), metadata=_facts(_items))
    """Options for Inductor itself, as `torch.compile` takes them."""

    @staticmethod
    def resolve(
        options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> "Config":
        """The defaults, changed by the environment, changed by `options`.

        Raises:
            ConfigError: an option or a `FIXPASS_*` variable is unknown, or its value is wrong.
        """
        found = _from_environment(os.environ if environ is None else environ)
        known = {option.name: option for option in fields(Config)}
        for name, value in (options or {}).items():
            name, value = _renamed("option {!r}".format, name, value)
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; known options: {', '.join(known)}")
            found[name] = known[name].metadata["check"](f"option {name!r}", value)
        config = replace(Config(), **found)
        if config.norm_kernels is not None:
            from fixpass.pipelines import check_kernels

            check_kernels(config.norm_kernels, config)
        return config


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The value of each option that a variable sets."""
    known = {option.metadata["variable"]: option for option in fields(Config)}
    old_names = {_variable(name): name for name in _RENAMED}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable.startswith(_TESTS):
            continue
        if variable in old_names:
            name, text = _renamed(_variable, old_names[variable], text)
            variable = _variable(name)
        if variable not in known:
            names = [_SWITCH, *filter(None, known)]
            near = get_close_matches(variable, names) or names
            raise ConfigError(f"unknown variable {variable}; near names: {', '.join(near)}")
        if text:
            option = known[variable].metadata
            found[known[variable].name] = option["check"](variable, option["parse"](variable, text))
    return found


def _variable(name: str) -> str:
    return f"{_PREFIX}{name.upper()}"


def _renamed(label: Callable[[str], str], name: str, value: Any) -> tuple[str, Any]:
    """The present name and value of an option; an old name is a DeprecationWarning."""
    if name not in _RENAMED:
        return name, value
    new, values = _RENAMED[name]
    new_value = values.get(value, value) if isinstance(value, str) else value
    shown = "" if new_value == value else f" with {new_value!r} in place of {value!r}"
    text = f"{label(name)} is deprecated: use {label(new)}{shown}"
    warnings.warn(text, DeprecationWarning, stacklevel=4)
    return new, new_value


def pass_names() -> tuple[str, ...]:
    """The names of all our passes, in the order in which they run."""
    from fixpass.lowering.target import CPU
    from fixpass.passes import default_passes, entry_passes

    return tuple(step.name for step in (*entry_passes(), *default_passes(CPU)))


def is_switched_on(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `FIXPASS=1` asks for fixpass in the serving engines of this process."""
    text = (os.environ if environ is None else environ).get(_SWITCH, "")
    return bool(text) and _flag(_SWITCH, text)


def set_default(name: str, value: str) -> None:
    """Set an engine's variable for this process and its children, where the user has not."""
    os.environ.setdefault(name, value)


def local_world_size(environ: Mapping[str, str] | None = None) -> str:
    """How many ranks the launcher says it started on this host; empty where it does not say."""
    return (os.environ if environ is None else environ).get("LOCAL_WORLD_SIZE", "")


def set_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of fixpass that are set, known or not, but those of its tests."""
    found = os.environ if environ is None else environ
    ours = (name for name in sorted(found) if name == _SWITCH or name.startswith(_PREFIX))
    return {name: found[name] for name in ours if not name.startswith(_TESTS)}


def faulty_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is wrong with a variable, for each that is unknown or that does not parse."""
    faults: dict[str, str] = {}
    for name, value in set_variables(environ).items():
        try:
            if name == _SWITCH:
                is_switched_on({name: value})
            else:
                Config.resolve(environ={name: value})
        except ConfigError as error:
            faults[name] = str(error)
    return faults

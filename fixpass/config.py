"""Config: every option of the backend, from `options=` and from `FIXPASS_*` variables.

This is the only place that reads the environment. An option wins over its variable; an unknown
option, or a value that does not parse, raises ConfigError with the known ones.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fixpass.lowering.contract_table import kernel_names
from fixpass.passes.base import Pass
from fixpass.passes.fold_weights import Mode
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.symmetric_memory.policy import Policy


@dataclass(frozen=True)
class Config:
    """The options of `torch.compile(model, backend="fixpass", options={...})`."""

    strict: bool = False
    """Raise where a pass fails, instead of compiling without it and saying so on the report."""
    verify: bool = False
    """Check the graph after every pass on fake tensors, with exact strides."""
    lower: str = "inductor"
    """"inductor" compiles; "eager" runs the rewritten graph op by op, for debugging."""
    norm_kernels: tuple[str, ...] | None = None
    """Norm kernels in order of preference, in place of the target's own order."""
    disable: tuple[str, ...] = ()
    """Names of passes to leave out."""
    fuel: int | None = None
    """Stop rewriting after this many changes, to bisect a wrong result."""
    passes: tuple[Pass, ...] = ()
    """Passes of your own, run after ours."""
    symmetric_memory: bool | Policy = True
    """All-reduces in symmetric memory: on, off, or on under a policy of your own."""
    symmetric_timeout: float = 30.0
    """Seconds that a rank waits for the others in an all-reduce before it raises."""
    guards: bool = True
    """Lay operands out for opaque norm kernels that engines call outside compiled graphs."""
    fold: Mode | None = None
    """Weight-only subgraphs: "derived" keeps their values beside the weights, "inplace" changes the
    weights themselves where that is safe, "off" leaves them in the graph. None is "derived" for
    weights on CPU."""
    linear: str = "auto"
    """Linear layers on CPU: "auto" calls `skinny_linear` for few rows, "inductor" never."""
    inductor: tuple[tuple[str, Any], ...] = ()
    """Options for Inductor itself, as `torch.compile` takes them."""

    @staticmethod
    def resolve(
        options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> "Config":
        """The defaults, changed by the environment, changed by `options`."""
        config = _from_environment(os.environ if environ is None else environ)
        given = dict(options or {})
        known = [field.name for field in fields(Config)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}"
            )
        return replace(config, **{name: _check(name, value) for name, value in given.items()})


# Variables that parse from a word; `passes` and `inductor` take objects and have no variable.
_VARIABLES: dict[str, Callable[[str, str], Any]] = {
    "strict": lambda name, text: _boolean(name, text),
    "verify": lambda name, text: _boolean(name, text),
    "lower": lambda name, text: text,
    "norm_kernels": lambda name, text: _words(text),
    "disable": lambda name, text: _words(text),
    "fuel": lambda name, text: _integer(name, text),
    "symmetric_memory": lambda name, text: _boolean(name, text),
    "symmetric_timeout": lambda name, text: _seconds(name, text),
    "guards": lambda name, text: _boolean(name, text),
    "fold": lambda name, text: text,
    "linear": lambda name, text: text,
}


def _from_environment(environ: Mapping[str, str]) -> Config:
    found: dict[str, Any] = {}
    for name, parse in _VARIABLES.items():
        variable = f"FIXPASS_{name.upper()}"
        if environ.get(variable):
            found[name] = _check(name, parse(variable, environ[variable]))
    return Config(**found)


def _check(name: str, value: Any) -> Any:
    """The value as Config keeps it; ConfigError when it is none of those allowed."""
    if name in ("strict", "verify", "guards") and not isinstance(value, bool):
        raise ConfigError(f"option {name!r} is True or False, not {value!r}")
    if name == "lower" and value not in ("inductor", "eager"):
        raise ConfigError(f'option "lower" is "inductor" or "eager", not {value!r}')
    if name == "linear" and value not in ("auto", "inductor"):
        raise ConfigError(f'option "linear" is "auto" or "inductor", not {value!r}')
    if name == "fold" and value not in ("inplace", "derived", "off", None):
        raise ConfigError(f'option "fold" is "inplace", "derived" or "off", not {value!r}')
    if name == "fuel" and not (value is None or (type(value) is int and value >= 0)):
        raise ConfigError(f'option "fuel" is a number of changes or None, not {value!r}')
    if name == "symmetric_memory" and not isinstance(value, (bool, Policy)):
        raise ConfigError(f"option {name!r} is True, False or a Policy, not {value!r}")
    if name == "symmetric_timeout" and not (_is_number(value) and value > 0):
        raise ConfigError(f"option {name!r} is a number of seconds above 0, not {value!r}")
    if name == "inductor":
        if not isinstance(value, Mapping):
            raise ConfigError(f"option 'inductor' is a mapping of names to values, not {value!r}")
        return tuple(sorted(dict(value).items()))
    if name in ("norm_kernels", "disable", "passes") and value is not None:
        return _check_names(name, value)
    return value


def _check_names(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"option {name!r} is a sequence, not {value!r}")
    items = tuple(value)
    if name == "passes":
        wrong = [item for item in items if not isinstance(item, Pass)]
        known: tuple[str, ...] = ("instances of fixpass.Pass",)
    else:
        known = kernel_names() if name == "norm_kernels" else pass_names()
        wrong = [item for item in items if item not in known]
    if wrong:
        raise ConfigError(f"option {name!r}: unknown {wrong[0]!r}; known: {', '.join(known)}")
    return items


def pass_names() -> tuple[str, ...]:
    """The names of all our passes, in the order in which they run."""
    from fixpass.lowering.target import CPU
    from fixpass.passes import default_passes, entry_passes

    return tuple(step.name for step in (*entry_passes(), *default_passes(CPU)))


def _boolean(name: str, text: str) -> bool:
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in words:
        raise ConfigError(f"{name}={text!r}: say one of {', '.join(words)}")
    return words[text.lower()]


def _integer(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not a number")
    return int(text)


def _seconds(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a number of seconds") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_switched_on(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `FIXPASS=1` asks for fixpass in the serving engines of this process."""
    text = (os.environ if environ is None else environ).get("FIXPASS", "")
    return bool(text) and _boolean("FIXPASS", text)


def set_default(name: str, value: str) -> None:
    """Set an engine's variable for this process and its children, where the user has not."""
    os.environ.setdefault(name, value)


def local_world_size(environ: Mapping[str, str] | None = None) -> str:
    """How many ranks the launcher says it started on this host; empty where it does not say."""
    return (os.environ if environ is None else environ).get("LOCAL_WORLD_SIZE", "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())

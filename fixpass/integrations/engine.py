"""What the plugins of all engines do alike: look at the engine's version, and say a thing once."""

import multiprocessing
from collections.abc import Callable
from functools import cache
from logging import Logger
from pathlib import Path
from types import FunctionType, ModuleType

from fixpass.runtime.errors import EngineError


def check_version(engine: ModuleType, name: str, supported: tuple[int, int]) -> None:
    """Raise EngineError unless `engine` is of the major and minor version that we know."""
    found = tuple(int(part) for part in engine.__version__.split(".")[:2] if part.isdecimal())
    if found != supported:
        raise EngineError(
            f"fixpass works with {name} {supported[0]}.{supported[1]}, and this is "
            f"{engine.__version__}"
        )


def check_written_in(function: object, package: ModuleType, where: str) -> None:
    """Raise EngineError unless `function`, found at `where`, was written in a file of `package`.

    Another one is not there any more, or another plugin's hook.
    """
    if not isinstance(function, FunctionType):
        raise EngineError(f"{where} is {function!r}, not a function")
    file = Path(function.__code__.co_filename)
    if not any(file.is_relative_to(folder) for folder in package.__path__):
        raise EngineError(f"{where} is {whose(function)}, not the engine's own")


def is_hook_of(module: str, function: object) -> bool:
    """Whether `function` was put in its place by that module of ours."""
    return isinstance(function, FunctionType) and function.__module__ == module


def whose(function: object) -> str:
    """A function in words: its name, and the file that it was written in."""
    if isinstance(function, FunctionType):
        return f"{function.__qualname__} of {function.__code__.co_filename}"
    return repr(function)


def once(log: Logger, *, in_workers: bool = False) -> Callable[[str], None]:
    """What warns in `log`, once a text, and in the process that the user started.

    The others would only repeat it; `in_workers` is for what they alone know.
    """

    @cache
    def say_once(text: str) -> None:
        if in_workers or multiprocessing.parent_process() is None:
            log.warning("fixpass: %s", text)

    return say_once

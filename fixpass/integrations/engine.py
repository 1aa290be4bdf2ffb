"""What the plugins of all engines do alike: look at the engine's version, and say a thing once."""

import multiprocessing
from collections.abc import Callable
from functools import cache
from logging import Logger
from types import ModuleType

from fixpass.runtime.errors import EngineError


def check_version(engine: ModuleType, name: str, supported: tuple[int, int]) -> None:
    """Raise EngineError unless `engine` is of the major and minor version that we know."""
    found = tuple(int(part) for part in engine.__version__.split(".")[:2] if part.isdecimal())
    if found != supported:
        raise EngineError(
            f"fixpass works with {name} {supported[0]}.{supported[1]}, and this is "
            f"{engine.__version__}"
        )


def once(log: Logger) -> Callable[[str], None]:
    """What warns in `log`, once a text, and in the process that the user started.

    The others would only repeat it.
    """

    @cache
    def say_once(text: str) -> None:
        if multiprocessing.parent_process() is None:
            log.warning("fixpass: %s", text)

    return say_once

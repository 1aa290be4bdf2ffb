"""vLLM's plugin: `--compilation-config '{"backend": "fixpass"}'` or `FIXPASS=1` switches it on.

vLLM calls `register` in each of its processes. A hook wraps the last step of its configuration, in
which a platform may still change the backend, and then adds our passes to the options of Inductor,
where vLLM's caches see them. No code of a model or a layer is touched. Where the hook does not fit
this vLLM, vLLM runs without fixpass and a warning says so.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import ModuleType
from typing import Any

from fixpass.config import Config, is_switched_on
from fixpass.integrations.engine import (
    check_version,
    check_written_in,
    is_hook_of,
    once,
    whose,
)
from fixpass.integrations.vllm.folding_backend import hook_backend
from fixpass.runtime.errors import EngineError

NAME = "fixpass"
SUPPORTED = (0, 32)
# What a rank of an engine may take longer than another one, where no time is given: it compiles.
PATIENCE = 300.0
# A child of vLLM's own logger: its lines stand among vLLM's, at the level that vLLM is set to.
log = logging.getLogger("vllm.fixpass")
say_once = once(log)


def register() -> None:
    """The entry point: put the hook in place once, or warn why not."""
    try:
        engine = importlib.import_module("vllm")
        module = _supported(engine)
        _hook(module.VllmConfig, engine)
        _hook_folds(module.CompilationConfig, engine)
    except ImportError as error:
        say_once(f"vLLM is not here ({error}): nothing to switch fixpass on in")
    except EngineError as error:
        say_once(f"{error}: vLLM runs without fixpass")


def _supported(engine: ModuleType) -> ModuleType:
    """The module that holds vLLM's configuration, in a version that we know."""
    check_version(engine, "vLLM", SUPPORTED)
    return importlib.import_module("vllm.config.vllm")


def _hook(configuration: type, engine: ModuleType) -> None:
    """Wrap `configuration.__post_init__`, once."""
    original: Any = configuration.__dict__.get("__post_init__")
    if is_hook_of(__name__, original):
        return
    where = f"{configuration.__name__}.__post_init__"
    try:
        check_written_in(original, engine, where)
    except EngineError as error:
        raise EngineError(
            f"{error}: another plugin hooks the same place; VLLM_PLUGINS says which plugins are "
            "loaded"
        ) from error

    @wraps(original)
    def post_init(self: Any) -> None:
        standing = type(self).__dict__.get("__post_init__")
        _configure(self, original, standing if standing is not post_init else None)

    post_init.__module__ = __name__
    configuration.__post_init__ = post_init  # type: ignore[attr-defined]


def _hook_folds(configuration: type, engine: ModuleType) -> None:
    """Hook the backend for `fold-weights`; the other passes run without this hook too."""
    try:
        hook_backend(configuration, engine, _folding)
    except EngineError as error:
        say_once(f"{error}: vLLM runs without fold-weights")


def _folding(compilation: Any) -> Config | None:
    """Our options, where vLLM's configuration has our passes."""
    from fixpass.integrations.vllm.inductor_stages import options_of

    return options_of(compilation)


def _configure(config: Any, original: Callable[[Any], None], in_front: Any) -> None:
    """Run vLLM's own step, and put our passes in where they are asked for."""
    compilation = config.compilation_config
    named = compilation.backend == NAME
    if named:
        # All that vLLM derives from the backend's name shall be what it derives for Inductor.
        compilation.backend = "inductor"
    original(config)
    if not (named or is_switched_on()):
        return
    if in_front is not None:
        say_once(
            f"{whose(in_front)} hooks VllmConfig.__post_init__ in front of fixpass: vLLM runs "
            "without fixpass; VLLM_PLUGINS says which plugins are loaded"
        )
        return
    reason = adopt(config)
    if reason:
        say_once(f"{reason}: vLLM runs without fixpass")


def adopt(config: Any) -> str:
    """Put our passes among the options of Inductor; the reason where there is no place for them."""
    from fixpass.integrations.vllm.inductor_stages import install

    compilation = config.compilation_config
    if compilation.mode is None or compilation.mode.name in ("NONE", "STOCK_TORCH_COMPILE"):
        mode = compilation.mode.name if compilation.mode is not None else "NONE"
        return f"compilation mode {mode} compiles nothing that fixpass sees"
    if compilation.backend != "inductor":
        return f"the backend is {compilation.backend!r}, not Inductor"
    install(config, resolve(config.additional_config))
    return ""


def resolve(additional: Any) -> Config:
    """Our options: from `--additional-config '{"fixpass": {...}}'` and from the environment."""
    given = additional.get(NAME) if isinstance(additional, dict) else None
    resolved = Config.resolve(given)
    if resolved.symmetric_timeout == Config().symmetric_timeout:
        return replace(resolved, symmetric_timeout=PATIENCE)
    return resolved

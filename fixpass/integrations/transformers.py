"""Compile a `transformers` model for all that `generate` does with it.

Every call of the model is compiled: prefill and decode, with static and dynamic caches, tensor
parallel ranks, continuous batches. Where `generate` itself compiles a static decode step with
Inductor, fixpass replaces Inductor. Weights, configs and what `save_pretrained` writes stay as they
are.
"""

import inspect
import logging
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import nn

from fixpass.config import Config
from fixpass.runtime.errors import ConfigError

log = logging.getLogger("fixpass")
OLDEST = (5, 0)
# All models share the first frame that Dynamo sees, and with it the limit of compilations, behind
# which they would run eagerly. Older torch cannot count for each model.
_ISOLATED = {
    name: True for name in inspect.signature(torch.compile).parameters if name.startswith("isolate")
}

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> Model:
    """Compile `model` in place and return it.

    dynamic, fullgraph: as `torch.compile` takes them; options: see `fixpass.Config`. Raises
    ConfigError for what is no `transformers` model, and for an unknown option. In a version that
    is not supported the model stays as it is, and a warning says so.
    """
    from transformers import PreTrainedModel

    Config.resolve(options)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{type(model).__name__} is no transformers model: {_way_out(model)}")
    if not _is_supported(version("transformers")):
        return model
    model.compile(
        backend="fixpass",
        dynamic=dynamic,
        fullgraph=fullgraph,
        options=dict(options) or None,
        **_ISOLATED,
    )
    # On the instance: the class is everybody's, and its name is what save_pretrained writes.
    instance: Any = model
    instance.get_compiled_call = partial(_compiled_call, model, dict(options))
    return model


def _way_out(model: Any) -> str:
    """The call that compiles `model`, or the transformers model inside it, as PEFT has one."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = (path for path, module in modules if isinstance(module, PreTrainedModel))
    if path := next(inside, None):
        return f"compile the one inside it with compile(model.{path}), and call {name} as before"
    return 'compile it with torch.compile(model, backend="fixpass")'


def _is_supported(found: str) -> bool:
    major, minor, *_ = (int(part) for part in found.split(".")[:2])
    if (major, minor) >= OLDEST:
        return True
    log.warning(
        "fixpass supports transformers %d.%d and newer, found %s: the model runs without fixpass",
        *OLDEST,
        found,
    )
    return False


def _compiled_call(model: Any, options: dict[str, Any], config: Any) -> Any:
    """What `generate` calls for a step with a static cache, where the device is one for that.

    Its own choice of mode stays (CUDA graphs, for instance); a backend that is not the default
    one was asked for, and stays too.
    """
    from transformers import CompileConfig

    config = config or model.generation_config.compile_config or CompileConfig()
    if config.backend == "inductor":
        config = replace(config, backend="fixpass")
        if options and not config.options:
            # torch.compile takes a mode or options, not both.
            config = replace(config, options=options, mode=None)
    return type(model).get_compiled_call(model, config)

"""From a word of the command line to a model and its inputs.

`FILE.py:FUNCTION` and `MODULE:FUNCTION` name a function that returns them. `hf:CLASS` makes a small
model of transformers with random weights; nothing is downloaded.
"""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fixpass.runtime.errors import ConfigError

FORMS = "FILE.py:FUNCTION, MODULE:FUNCTION or hf:CLASS"
_HF = "hf"
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "vocab_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The sizes of `hf:CLASS`, where its config has such an entry."""
_TOKENS = 16


@dataclass(frozen=True)
class Loaded:
    """A model or a function, and the arguments to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(name: str, settings: Iterable[str] = ()) -> Loaded:
    """The model that a word names.

    Args:
        name: `FILE.py:FUNCTION`, `MODULE:FUNCTION` or `hf:CLASS`. The function returns
            (model, args) or (model, args, kwargs).
        settings: entries of the config of `hf:CLASS`, such as "hidden_size=256".

    Raises:
        ConfigError: there is no such function or class, it gives something else, or an entry is
            unknown.
    """
    place, _, item = name.rpartition(":")
    if place == _HF:
        return _load_transformers(item, dict(map(_setting, settings)))
    if not place:
        raise ConfigError(f"{name!r}: say {FORMS}")
    if list(settings):
        raise ConfigError(f"--set is for {_HF}:CLASS, not for {name}")
    given = load_function(name)()
    if not isinstance(given, tuple) or len(given) not in (2, 3) or not isinstance(given[1], tuple):
        raise ConfigError(
            f"{name} has to return (model, args) or (model, args, kwargs) with a tuple args, for "
            "example (model, (tokens,))"
        )
    return Loaded(*given)


def load_function(name: str) -> Callable[[], Any]:
    """Import the function that `FILE.py:FUNCTION` or `MODULE:FUNCTION` names.

    Raises:
        ConfigError: the name has another form, or there is no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    if not place:
        raise ConfigError(f"{name!r}: say FILE.py:FUNCTION or MODULE:FUNCTION")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found: Callable[[], Any] | None = vars(module).get(function)
    if not callable(found):
        raise ConfigError(f"{place} has no function {function!r}")
    return found


def _load_file(path: Path) -> ModuleType:
    """Import a file from any folder, under a name that no installed module has.

    Dynamo imports the module of a class by its name, so the module is in `sys.modules`. The file
    may import its neighbours: its folder comes last on `sys.path`.
    """
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    name = f"fixpass_explained_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python module")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"there is no module {error.name!r} on sys.path") from None


def _setting(text: str) -> tuple[str, Any]:
    """`hidden_size=256` as a name and a value; a value that is no literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: say NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _load_transformers(name: str, settings: dict[str, Any]) -> Loaded:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ConfigError(f"{_HF}:{name} needs transformers: pip install transformers") from None
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        models = [word for word in dir(transformers) if word.endswith(("Model", "LM"))]
        near = ", ".join(get_close_matches(name, models)) or "none"
        raise ConfigError(f"transformers has no model class {name!r}; near names: {near}")
    model_class: Any = cls
    config_class = model_class.config_class
    known = {**config_class().to_dict(), **config_class.attribute_map}
    for entry in settings:
        if entry not in known:
            near = ", ".join(get_close_matches(entry, known)) or ", ".join(sorted(known))
            raise ConfigError(f"{config_class.__name__} has no entry {entry!r}; near names: {near}")
    config = config_class(**{k: v for k, v in _SMALL.items() if k in known} | settings)
    torch.manual_seed(0)
    model = model_class(config).eval().to(torch.bfloat16)
    return Loaded(model, (), _inputs(model, config))


def _inputs(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Random inputs under the name that the model's class says.

    Raises:
        ConfigError: the model reads neither tokens nor images.
    """
    if model.main_input_name == "input_ids":
        tokens = torch.randint(3, config.vocab_size, (1, _TOKENS))
        more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        return {"input_ids": tokens, **more}
    if model.main_input_name == "pixel_values":
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, dtype=torch.bfloat16)}
    raise ConfigError(
        f"{type(model).__name__} reads {model.main_input_name}: write a function that returns the "
        "model and its inputs, and name it as FILE.py:FUNCTION"
    )

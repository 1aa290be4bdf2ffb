"""vLLM's reload of weights into parameters that have another layout.

vLLM loads into temporary parameters, processes them, and copies them through `.data` into the ones
that its kernels read; or a model loads into its parameters directly. Around both, parameters show
the checkpoint's layout, so that values land in their right places. Writes through `.data` are
counted as changes, which torch does not do. Other code that writes weights needs
`fixpass.weights.checkpoint_layout`.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from fixpass.integrations.engine import check_written_in, is_hook_of, once
from fixpass.runtime.errors import EngineError
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.parameter_layout import record_of

log = logging.getLogger("vllm.fixpass")
say_once = once(log, in_workers=True)


class Landing:
    """Stands in for a parameter with a layout as the destination of vLLM's copy."""

    def __init__(self, param: Tensor) -> None:
        self.param = param

    def copy_(self, values: Tensor) -> "Landing":
        """Bring values in vLLM's layout into the parameter."""
        with torch.no_grad(), _written(lambda: [self.param]):
            self.param.copy_(values)
        return self


def _around_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """The copy of a layer's processed values into the tensors that kernels read."""

    @wraps(original)
    def copy(layer: Any, info: Any) -> Any:
        held = [tensor for part in info.kernel_tensors for tensor in part.values()]
        with _written(lambda: held):
            return original(layer, info)

    return copy


def _around_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """A load into a model's parameters as they are, by loaders of their own."""

    @wraps(original)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _written(self.module.parameters):
            return original(self, *args, **kwargs)

    return load_weights


@contextmanager
def _written(tensors: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """A context for writes through `.data`: in the checkpoint's layout, and counted as changes."""
    folded = [tensor for tensor in tensors() if record_of(tensor) is not None]
    try:
        # Without a fold nothing is to be watched.
        with checkpoint_layout(folded) if folded else nullcontext():
            yield
    finally:
        # Those that are there now: a load may have put others in their places.
        torch.autograd.graph.increment_version(list(tensors()))


def _around_look_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """The look-up of the parameter that values in vLLM's own layout are copied into."""

    @wraps(original)
    def look_up(model: Any, name: str) -> Any:
        param = original(model, name)
        return param if record_of(param) is None else Landing(param)

    return look_up


HOOKS = (
    (
        "vllm.model_executor.model_loader.reload.layerwise:_copy_and_restore_kernel_tensors",
        _around_copy,
    ),
    ("vllm.model_executor.model_loader.reload.inplace:get_parameter_for_reload", _around_look_up),
    ("vllm.model_executor.models.utils:AutoWeightsLoader.load_weights", _around_load),
)


def hook_reload() -> None:
    """Put all hooks in place, each once; one whose target is not there is left out and named."""
    for target, around in HOOKS:
        try:
            module, _, names = target.partition(":")
            within, _, name = names.rpartition(".")
            owner = resolve_name(f"{module}:{within}")
            original = vars(owner).get(name)
            if is_hook_of(__name__, original):
                continue
            check_written_in(original, importlib.import_module("vllm"), target)
        except (ImportError, AttributeError, EngineError) as error:
            say_once(f"{error}: what it writes does not go by the records of folds")
            continue
        hooked = around(original)
        hooked.__module__ = __name__
        setattr(owner, name, hooked)

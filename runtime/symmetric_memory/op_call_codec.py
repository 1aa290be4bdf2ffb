"""Encodes a call of an op as tensors and text, which the schema of another op can hold."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.providers import overload_of


def encode_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], str] | None:
    """The tensors of a call, and the rest of it as text; None where it cannot be written down.

    Tensors may be nodes of a graph. Numbers, words, dtypes and lists of these can be written down.
    """
    tensors: list[Any] = []

    def encoded(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [encoded(each) for each in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if not isinstance(value, (torch.fx.Node, Tensor)):
            raise TypeError(type(value))
        tensors.append(value)
        return {"tensor": len(tensors) - 1}

    try:
        spec = json.dumps([encoded(args), {k: encoded(v) for k, v in kwargs.items()}])
    except TypeError:
        return None
    return tensors, spec


def decode_call(
    op: str, arguments: str, tensors: Sequence[Any]
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The op, its positional and its keyword arguments."""
    run, args, kwargs = _parsed(op, arguments)
    return run, _filled(args, tensors), _filled(kwargs, tensors)


@lru_cache(maxsize=1024)
def _parsed(op: str, arguments: str) -> tuple[Any, list[Any], dict[str, Any]]:
    args, kwargs = json.loads(arguments)
    return overload_of(op), args, kwargs


def _filled(spec: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(spec, list):
        return [_filled(each, tensors) for each in spec]
    if isinstance(spec, dict) and spec.keys() == {"tensor"}:
        return tensors[spec["tensor"]]
    if isinstance(spec, dict) and spec.keys() == {"dtype"}:
        return getattr(torch, spec["dtype"])
    if isinstance(spec, dict):
        return {key: _filled(value, tensors) for key, value in spec.items()}
    return spec

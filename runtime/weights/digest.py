"""A digest of all weights of a model, the same for every layout that its parameters may have.

It reads every byte: about a second per gigabyte. Two ranks with different shards differ.
"""

import hashlib

import torch
from torch import nn

from fixpass.runtime.weights.formats.memory import raw_bytes
from fixpass.runtime.weights.relayout import logical, record_of
from fixpass.runtime.weights.targets import local_box, targets


def digest(model: nn.Module) -> str:
    """Of names, dtypes, shapes and values of parameters and persistent buffers on this rank."""
    found = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for name, target in sorted(targets(model).items()):
            has_layout = record_of(target.tensor) is not None
            value = logical(target.tensor) if has_layout else local_box(target.tensor.detach())[0]
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(raw_bytes(value))
    return found.hexdigest()

"""A digest of all weights in the checkpoint's layout: the same however they are folded.

It reads every byte, about a second a gigabyte. Two ranks with different shards differ.
"""

import hashlib

import torch
from torch import nn

from fixpass.runtime.weights.formats.memory import raw_bytes
from fixpass.runtime.weights.relayout import logical
from fixpass.runtime.weights.table import record_of
from fixpass.runtime.weights.targets import local_box, targets


def digest(model: nn.Module) -> str:
    """Of names, dtypes, shapes and values of parameters and persistent buffers on this rank."""
    found = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for name, target in sorted(targets(model).items()):
            folded = record_of(target.tensor) is not None
            value = logical(target.tensor) if folded else local_box(target.tensor.detach())[0]
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(raw_bytes(value))
    return found.hexdigest()

"""Which versions of torch fixpass supports, and what depends on the installed one."""

import torch

from fixpass.runtime.errors import UnsupportedTorchError

OLDEST, NEWEST = (2, 11), (2, 14)
GUARDS_WEIGHT_SHAPES = (2, 12)
"""From here on Dynamo compiles again where a weight's `.data` has another shape or stride."""


def torch_version(version: str = torch.__version__) -> tuple[int, ...]:
    """The major and the minor version: (2, 13) for "2.13.0+cpu"."""
    return tuple(int(part) for part in version.split(".")[:2])


def check_torch(version: str = torch.__version__) -> None:
    """Raise UnsupportedTorchError unless the installed torch is one that fixpass supports."""
    if not OLDEST <= torch_version(version) <= NEWEST:
        raise UnsupportedTorchError(
            f"fixpass supports torch {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, found "
            f'{version}: install another torch, or compile with backend="inductor"'
        )

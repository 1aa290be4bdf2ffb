"""The old name of `fixpass.eager_kernels`, kept for one release."""

import warnings

from fixpass.eager_kernels import wrap as guard

__all__ = ["guard"]

warnings.warn(
    "fixpass.guards is now fixpass.eager_kernels, and guard is wrap",
    DeprecationWarning,
    stacklevel=2,
)

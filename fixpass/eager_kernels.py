"""Norm kernels of other libraries in eager code, for operands of any shape and strides.

`wrap` wraps a kernel under the contract of the kernel table, which the passes read too.
`FIXPASS_EAGER_KERNELS=off` gives every kernel back as it is. Nothing of another library is imported
or replaced here.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fixpass.config import Config
from fixpass.lowering.eager_calls import minds_offsets, planner
from fixpass.runtime.errors import KernelError
from fixpass.runtime.opaque_norms import OPAQUE_NORMS, OpaqueNorm
from fixpass.runtime.wrapped_kernel import wrapped

WRAPPED = tuple(row for row in OPAQUE_NORMS if row.kernel)
"""The foreign ops whose eager kernels can be wrapped."""


def wrap(kernel: Callable[..., Any], op: str) -> Callable[..., Any]:
    """Give a kernel operands that its contract allows, whatever their shapes and strides.

    A call whose contract holds goes straight to the kernel. Else the operands are viewed as rows,
    or exactly the operands that need it are copied. Where no layout helps, the reference runs.

        rms_norm = wrap(aiter.rmsnorm2d_fwd, "aiter::rmsnorm2d_fwd")

    Args:
        kernel: a function with the arguments of the op.
        op: the name of the op, such as "aiter::rmsnorm2d_fwd"; see `WRAPPED`.

    Returns:
        A function with the arguments of `kernel`. Under torch.compile it is `kernel` itself.

    Raises:
        KernelError: the op is unknown; or, at a call, the operands differ in their rows.

    """
    row = next((row for row in WRAPPED if row.name == op), None)
    if row is None:
        known = ", ".join(row.name for row in WRAPPED)
        raise KernelError(f"no eager kernel {op!r} is known; known: {known}")
    if not Config.resolve().eager_kernels:
        return kernel
    call = replace(row, arguments=_arguments(kernel, row))
    return wrapped(kernel, call, planner(call), aligned=minds_offsets(call))


def _arguments(kernel: Callable[..., Any], row: OpaqueNorm) -> tuple[str, ...]:
    """The kernel's own parameters, which differ by version, where its signature shows them."""
    try:
        parameters = inspect.signature(kernel).parameters.values()
    except (TypeError, ValueError):
        return row.arguments
    names = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return names if set(row.roles.values()) <= set(names) else row.arguments

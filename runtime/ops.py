"""The ops of norms: `fixpass::rms_norm`, `layer_norm`, `qk_norm` and the others in `SCHEMAS`.

An op states what is computed; its `kernel_name` argument says which kernel computes it. The name
"inductor" is the reference in `fixpass.runtime.norms`, and the empty name, an op that no pass has
seen, is our Triton kernel on CUDA and ROCm where it can compute the op, else the reference.
Gradients follow from the reference; `rms_norm_quant` has none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import norms, providers, strided
from fixpass.runtime.gated_norm import gated_rms_norm
from fixpass.runtime.quantized_norm import empty_results, rms_norm_quant
from fixpass.runtime.rotary_norm import empty_rotated, qk_norm_rope

_ROUNDING = (
    "float weight_offset=0.0, ScalarType? compute_dtype=None, ScalarType? norm_dtype=None, "
    'ScalarType? weight_dtype=None, ScalarType? out_dtype=None, str kernel_name=""'
)
_STEPS = f"int[]? order=None, {_ROUNDING}"
# Inductor passes the operands with the strides that the graph records. It keeps the copies of
# `insert-relayout`, and makes no copy for a kernel that reads any stride.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
SCHEMAS = {
    "rms_norm": f"(Tensor x, Tensor? weight, Tensor? bias, float eps, *, {_STEPS}) -> Tensor",
    "layer_norm": f"(Tensor x, Tensor? weight, Tensor? bias, float eps, *, {_STEPS}) -> Tensor",
    "add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, *, "
        f"{_STEPS}) -> (Tensor, Tensor)"
    ),
    "qk_norm": (
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, float eps, *, "
        f"{_STEPS}) -> (Tensor, Tensor)"
    ),
    "qk_norm_rope": (
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
        "float eps, *, int rotary_dim, int head_size=0, bool interleaved=False, "
        f"ScalarType? rope_dtype=None, ScalarType? result_dtype=None, {_STEPS}) -> (Tensor, Tensor)"
    ),
    "rms_norm_quant": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? scale, float eps, *, "
        "ScalarType quant_dtype, float low, float high, str apply, int group_size=0, "
        "ScalarType? amax_dtype=None, float limit=1.0, float amax_min=0.0, float scale_min=0.0, "
        "ScalarType? scale_dtype=None, "
        f"{_ROUNDING}) -> (Tensor, Tensor, Tensor)"
    ),
    "gated_rms_norm": (
        "(Tensor x, Tensor gate, Tensor? weight, float eps, *, str activation, "
        "bool gate_first=False, int group_size=0, ScalarType? gate_dtype=None, "
        f"ScalarType? normed_dtype=None, {_STEPS}) -> Tensor"
    ),
}


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **steps: Any
) -> Tensor:
    """Normalise the rows of x (..., hidden_size) by their root mean square."""
    return norms.rms_norm(x, eps, norms.Affine(weight, bias, **steps))


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **steps: Any
) -> Tensor:
    """Normalise the rows of x (..., hidden_size) to mean 0 and variance 1."""
    return norms.layer_norm(x, eps, norms.Affine(weight, bias, **steps))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual); x and residual have one shape."""
    total = norms.with_order(x + residual, steps.get("order"))
    return norms.rms_norm(total, eps, norms.Affine(weight, bias, **steps)), total


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    **steps: Any,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(q), rms_norm(k)) for q and k (..., heads, head_size)."""
    return rms_norm(q, q_weight, None, eps, **steps), rms_norm(k, k_weight, None, eps, **steps)


REFERENCES: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "add_rms_norm": add_rms_norm,
    "qk_norm": qk_norm,
    "qk_norm_rope": qk_norm_rope,
    "rms_norm_quant": rms_norm_quant,
    "gated_rms_norm": gated_rms_norm,
}
# Functions that give the results' layouts without the steps of the reference.
FAKES: dict[str, Callable[..., Any]] = {
    "rms_norm_quant": empty_results,
    "qk_norm_rope": empty_rotated,
}


def _make_autograd(name: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    reference = REFERENCES[name]

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.steps = {k: v for k, v in keyword_only_inputs.items() if k != "kernel_name"}

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad) if wanted]
        tensors: list[Any] = [None if t is None else t.detach() for t in ctx.saved_tensors]
        for i in needed:
            tensors[i].requires_grad_()
        with torch.enable_grad():
            outputs = reference(*tensors, ctx.eps, **ctx.steps)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        live = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        got = torch.autograd.grad(
            [y for y, _ in live],
            [tensors[i] for i in needed],
            [g for _, g in live],
            allow_unused=True,
        )
        found = dict(zip(needed, got, strict=True))
        return tuple(found.get(i) for i in range(len(tensors) + 1))

    return backward, setup_context


def _define(library: torch.library.Library, name: str) -> None:
    reference = REFERENCES[name]

    def run(*args: Any, kernel_name: str = "", **steps: Any) -> Any:
        if kernel_name in ("", "inductor"):
            return reference(*args, **steps)
        return providers.call(name, kernel_name, args, steps)

    def run_on_gpu(*args: Any, kernel_name: str = "", **steps: Any) -> Any:
        operands = (each for each in args if isinstance(each, Tensor))
        if kernel_name == "" and strided.can_compute(next(operands), steps, *operands):
            kernel_name = f"strided_{name}"
        return run(*args, kernel_name=kernel_name, **steps)

    def fake(*args: Any, kernel_name: str = "", **steps: Any) -> Any:
        return FAKES.get(name, reference)(*args, **steps)

    library.define(name + SCHEMAS[name], tags=TAGS)
    library.impl(name, run, "CompositeExplicitAutograd")
    library.impl(name, run_on_gpu, "CUDA")
    torch.library.register_fake(f"fixpass::{name}", fake, lib=library)
    if name == "rms_norm_quant":
        return
    backward, setup_context = _make_autograd(name)
    torch.library.register_autograd(
        f"fixpass::{name}", backward, setup_context=setup_context, lib=library
    )


def _define_copy(library: torch.library.Library) -> None:
    """`fixpass::copy`: a dense copy at the start of a storage of its own.

    Inductor drops an `aten.clone` whose strides are those of its input, and with it the new start.
    """

    def copy(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    library.define("copy(Tensor x) -> Tensor", tags=TAGS)
    library.impl("copy", copy, "CompositeExplicitAutograd")
    torch.library.register_fake("fixpass::copy", copy, lib=library)


# The library must live as long as the process: when it is collected, its ops are gone.
DEFINITIONS = torch.library.Library("fixpass", "DEF")
for _name in SCHEMAS:
    _define(DEFINITIONS, _name)
_define_copy(DEFINITIONS)

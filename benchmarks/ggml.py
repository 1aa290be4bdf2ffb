"""Linear layers as llama.cpp computes them, for the benchmark of linear layers.

`ggml` is llama.cpp's tensor library. It comes with the package llama-cpp-python, which fixpass does
not need; where the package is not installed, the benchmark leaves these rows out. The library
computes in float32 and reads weights in float32, float16 or bfloat16.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

# The numbers of `enum ggml_type` in ggml.h.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
ROOM = 64 << 20
"""Bytes for tensors' headers and for the work space of each call, which ggml never frees."""


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def library() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """`libggml-base` and `libggml-cpu` of llama-cpp-python, or None where it is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    for name in (
        "ggml_init",
        "ggml_new_tensor_2d",
        "ggml_mul_mat",
        "ggml_new_graph",
        "ggml_get_data",
    ):
        getattr(base, name).restype = ctypes.c_void_p
    return base, cpu


def linears(x: Tensor, weights: list[Tensor], threads: int) -> Callable[[], object] | None:
    """A call that multiplies x (rows, K) by copies of all weights (N, K); None without ggml.

    Raises:
        RuntimeError: ggml's results are not those of torch.

    """
    found = library()
    if found is None:
        return None
    base, cpu = found
    num_bytes = sum(weight.nbytes for weight in weights)
    results = sum(4 * weight.shape[0] * x.shape[0] for weight in weights)
    context = ctypes.c_void_p(base.ggml_init(_InitParams(num_bytes + results + ROOM, None, False)))
    graph = ctypes.c_void_p(base.ggml_new_graph(context))
    given = _filled(base, context, x.float())
    outputs = []
    for weight in weights:
        out = base.ggml_mul_mat(context, _filled(base, context, weight), given)
        base.ggml_build_forward_expand(graph, ctypes.c_void_p(out))
        outputs.append(ctypes.c_void_p(out))

    def run() -> object:
        return cpu.ggml_graph_compute_with_ctx(context, graph, threads)

    run()
    _compare(base, outputs[-1], x, weights[-1])
    return run


def _filled(base: ctypes.CDLL, context: ctypes.c_void_p, values: Tensor) -> ctypes.c_void_p:
    """A tensor of ggml that holds the values; ggml names the innermost size first."""
    rows, columns = map(ctypes.c_int64, values.shape)
    made = base.ggml_new_tensor_2d(context, TYPES[values.dtype], columns, rows)
    pointer = ctypes.c_void_p(made)
    ctypes.memmove(base.ggml_get_data(pointer), values.contiguous().data_ptr(), values.nbytes)
    return pointer


def _compare(base: ctypes.CDLL, out: ctypes.c_void_p, x: Tensor, weight: Tensor) -> None:
    expected = x.float() @ weight.float().t()
    result = torch.empty_like(expected)
    ctypes.memmove(result.data_ptr(), base.ggml_get_data(out), result.nbytes)
    error = (result - expected).abs().max() / expected.abs().max()
    # ggml rounds x to the dtype of the weight.
    if error > (1e-5 if weight.dtype is torch.float32 else 1e-2):
        raise RuntimeError(f"ggml's linear layer of {list(weight.shape)} is off by {error:.1e}")

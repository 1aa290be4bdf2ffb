"""Copies of 16-byte cells between two orders, in C: what folds into tiles of rows come down to.

torch copies such cells one by one, at half the speed of memory. The C is compiled once a process,
in a tenth of a second, when it is first needed; without a compiler torch copies.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.weights.targets import PLAIN

SOURCE = Path(__file__).parent / "csrc" / "turn.c"
LEAST = 1 << 20
"""Bytes from which on a copy is worth the trouble."""

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-std=c17", "-shared", "-fPIC")
_MOST_OUTER = 8
_CELL = 16


def turn_cells(out: Tensor, source: Tensor) -> bool:
    """`out.copy_(source)` of complex128 on CPU, where they differ in the order of two dimensions.

    Whether it was done: not for few bytes or other layouts, nor where there is no compiler. They
    may not overlap.
    """
    if out.nbytes < LEAST or not _is_plain(out) or not _is_plain(source):
        return False
    if out.shape != source.shape or out.requires_grad:
        return False
    plan, library = _Plan.of(out, source), _library()
    if plan is None or library is None:
        return False
    parts = plan.parts(torch.get_num_threads())
    _call(library.turn, [(p.out, p.source, *p.numbers(), 1) for p in parts])
    _written(out)
    return True


def turn_in_place(blocks: Tensor, moved: tuple[int, ...], staging: int) -> bool:
    """Let each of some dense blocks (count, *sizes) become its `.permute(moved)`.

    Whether it was done: see `turn_cells`. staging: how many bytes may be taken for it.
    """
    if blocks.nbytes < LEAST or not _is_plain(blocks) or not blocks.is_contiguous():
        return False
    stage = torch.empty_like(blocks[:1])
    turned = stage.permute(moved)
    plan, library = _Plan.of(blocks[:1].view(turned.shape), turned), _library()
    if plan is None or library is None:
        return False
    threads = max(1, min(torch.get_num_threads(), staging // stage.nbytes))
    step = -(-len(blocks) // threads)
    parts = [(part, torch.empty_like(stage)) for part in blocks.split(step)]
    calls = [
        (part.data_ptr(), own.data_ptr(), len(part), stage.numel(), *plan.numbers())
        for part, own in parts
    ]
    _call(library.turn_in_place, calls)
    _written(blocks)
    return True


def _call(function: Callable[..., None], calls: Sequence[tuple[object, ...]]) -> None:
    if len(calls) == 1:
        function(*calls[0])
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda call: function(*call), calls))


def _written(tensor: Tensor) -> None:
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True)
class _Plan:
    """Addresses, and sizes and strides in cells: of rows, columns, and the dimensions outside."""

    out: int
    source: int
    rows: int
    columns: int
    row: int
    column: int
    outer: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(out: Tensor, source: Tensor) -> "_Plan | None":
        triples = list(zip(out.shape, out.stride(), source.stride(), strict=True))
        dims = [triple for triple in triples if triple[0] != 1]
        rows = next((dim for dim in dims if dim[1] == 1), None)
        columns = next((dim for dim in dims if dim[2] == 1), None)
        if rows is None or columns is None or rows is columns or len(dims) > _MOST_OUTER + 2:
            return None
        if any(step == 0 for _, step, _ in dims):
            return None
        outer = tuple(dim for dim in dims if dim is not rows and dim is not columns)
        out_at, source_at = out.data_ptr(), source.data_ptr()
        if not out_at or not source_at or out_at % _CELL:
            return None
        return _Plan(out_at, source_at, rows[0], columns[0], rows[2], columns[1], outer)

    def parts(self, count: int) -> list["_Plan"]:
        """The work in about so many parts: by the longest outer dimension, or by columns."""
        dims = [*self.outer, (self.columns, self.column, 1)]
        index = max(range(len(dims)), key=lambda i: dims[i][0])
        size, out_step, source_step = dims[index]
        step = -(-size // count)
        found = []
        for start in range(0, size, step):
            length = min(step, size - start)
            dims[index] = length, out_step, source_step
            found.append(
                _Plan(
                    self.out + start * out_step * _CELL,
                    self.source + start * source_step * _CELL,
                    self.rows,
                    dims[-1][0],
                    self.row,
                    self.column,
                    tuple(dims[:-1]),
                )
            )
        return found

    def numbers(self) -> tuple[object, ...]:
        """All but the addresses, as the C takes it."""
        columns = list(zip(*self.outer, strict=True)) or [(), (), ()]
        outer = [(ctypes.c_int64 * len(self.outer))(*column) for column in columns]
        return self.rows, self.columns, self.row, self.column, len(self.outer), *outer


def _is_plain(tensor: Tensor) -> bool:
    is_known = type(tensor) in PLAIN and tensor.layout is torch.strided
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return is_known and not is_lazy and tensor.is_cpu and tensor.dtype == torch.complex128


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled C; None without a compiler that makes something of it."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    # No folder to write to is as good as no compiler.
    try:
        with tempfile.TemporaryDirectory(prefix="fixpass-turn-") as folder:
            path = Path(folder) / "turn.so"
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(path)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            # It stays mapped when the file is gone.
            library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    integer, address = ctypes.c_int64, ctypes.c_void_p
    numbers: list[Any] = [*[integer] * 5, address, address, address]
    library.turn.argtypes = [address, address, *numbers, integer]
    library.turn_in_place.argtypes = [address, address, integer, integer, *numbers]
    library.turn.restype = library.turn_in_place.restype = None
    return library

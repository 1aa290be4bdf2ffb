"""Registers, spills and widths of the chosen kernels, from the table of compiled ones.

`python -m benchmarks machine_code --write` makes `machine_code.csv`. Nothing is compiled here.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

from fixpass.lowering.target import FALLBACK
from fixpass.report.module_tree import SiteView
from fixpass.report.sites import SiteFacts

TABLE = Path(__file__).with_name("machine_code.csv")
_OURS = "strided_"
_WIDEST = 8
"""The widest row pitch, in elements, that the kernels tell apart."""
_DTYPES = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}


@dataclass(frozen=True)
class CodeKey:
    """What machine code depends on, as far as the table has it."""

    kernel: str
    hidden_size: int
    dtype: str
    pitch: str

    @staticmethod
    def of(norm: SiteFacts, kernel: str) -> "CodeKey":
        dims = list(zip(norm.strides, norm.shape, strict=True))
        pitch = f"{gcd(_WIDEST, *(step for step, size in dims[:-1] if size > 1))}n"
        if norm.strides[-1] != 1:
            pitch = "elements apart"
        return CodeKey(kernel, norm.shape[-1], _DTYPES.get(norm.dtype, norm.dtype), pitch)


@dataclass(frozen=True)
class CodeRow:
    """A chosen kernel at one size, and its machine code where the table has it."""

    key: CodeKey
    num_sites: int
    code: Mapping[str, str] | None
    why_not: str


def code_rows(views: Iterable[SiteView], target: str) -> Iterator[CodeRow]:
    """One row for each chosen kernel, size, dtype and pitch."""
    norms = ((norm, view.kernel) for view in views for norm, _ in view.norms[-1:])
    for key, number in Counter(CodeKey.of(*found) for found in norms).items():
        code = _compiled().get((target, key))
        yield CodeRow(key, number, code, "" if code else _why_not(key.kernel, target))


def _why_not(kernel: str, target: str) -> str:
    if kernel == FALLBACK:
        return "Inductor generates and fuses this code when the model is compiled"
    if not kernel.startswith(_OURS):
        return "compiled in its library, not by fixpass"
    targets = sorted({name for name, _ in _compiled()})
    if target not in targets:
        return f"not compiled for this target; the table has {', '.join(targets)}"
    return "this size, dtype or pitch is not in the table"


@cache
def _compiled() -> dict[tuple[str, CodeKey], dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["target"], _key(row)): row for row in rows}


def _key(row: Mapping[str, str]) -> CodeKey:
    return CodeKey(_OURS + row["kernel"], int(row["hidden"]), row["dtype"], row["pitch"])

"""`python -m benchmarks machine_code [--target NAME]`: the machine code of the norm kernels.

Kernels are compiled for a target without its device. Registers, spills, shared memory and the
width of every global load and store are read from SASS (nvdisasm, cuobjdump) or AMDGCN assembly.
No code runs, so no time is measured.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.assembly import MachineCode, read_amdgcn, read_cubin
from fixpass.lowering.target import target_named
from fixpass.report.compiled_kernels import TABLE
from fixpass.report.tables import TextTable, markdown_line
from fixpass.runtime.errors import ConfigError

DOCUMENTED_TARGETS = ("cuda:sm_90", "cuda:sm_100", "rocm:gfx942", "rocm:gfx950")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HIDDEN_SIZES = (64, 128, 256, 1024, 4096, 8192)
HEAD_SIZES = (64, 128, 256)
MARKER = "<!-- written by python -m benchmarks machine_code --write docs/kernels.md -->"
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "qk_norm")


@dataclass(frozen=True)
class Specimen:
    """One kernel as a table compiles it; `pitch` is the largest power of two in the row pitch."""

    op: str
    hidden_size: int
    dtype: str = "bf16"
    pitch: int = 8


def gpu_target(name: str) -> Any:
    """Triton's name for one of our targets."""
    from triton.backends.compiler import GPUTarget

    vendor, _, arch = target_named(name).name.partition(":")
    if vendor == "cuda":
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    if vendor == "rocm":
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ConfigError(f"target {name} has no kernels of ours: Inductor compiles for it")


def plan(specimen: Specimen, lanes: int) -> Any:
    """The launch of a specimen, from the launcher's own planning, on tensors without storage."""
    from fixpass.runtime.kernels.add_rms_norm import plan_add_norm
    from fixpass.runtime.kernels.launch import rounding
    from fixpass.runtime.kernels.qk_norm import plan_qk_norm
    from fixpass.runtime.kernels.rms_norm import plan_norm

    dtype = DTYPES[specimen.dtype]
    hidden_size = specimen.hidden_size
    weight = torch.empty(hidden_size, dtype=dtype, device="meta")
    bias = weight if specimen.op == "layer_norm" else None
    rule = rounding(weight, bias, 0.0, None, None)
    if specimen.op == "qk_norm":
        q, k = _packed(specimen, dtype, 32), _packed(specimen, dtype, 8)
        sides = {"q": (q, weight, _dense_like(q)), "k": (k, weight, _dense_like(k))}
        return plan_qk_norm(sides, 1e-6, rule, lanes=lanes)
    x = _packed(specimen, dtype, None)
    rows = {"x": x, "out": _dense_like(x)}
    if specimen.op == "add_rms_norm":
        rows = {"x": x, "residual": _dense_like(x), "out": x, "sum_out": _dense_like(x)}
        return plan_add_norm(rows, weight, bias, 1e-6, rule, lanes=lanes)
    center = specimen.op == "layer_norm"
    return plan_norm(rows, weight, bias, 1e-6, rule, center=center, lanes=lanes)


def _packed(specimen: Specimen, dtype: torch.dtype, heads: int | None) -> Tensor:
    """Rows, or heads of rows, sliced from wider ones whose pitch is an odd multiple of `pitch`."""
    hidden_size = specimen.hidden_size
    num_rows = 2**27 // hidden_size // (heads or 1)
    pitch = 3 * hidden_size * (heads or 1) + specimen.pitch
    wide = torch.empty((num_rows, pitch), dtype=dtype, device="meta")
    x = wide[:, : hidden_size * (heads or 1)]
    return x if heads is None else x.unflatten(1, (heads, hidden_size))


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def specialize(launch: Any, target: Any) -> tuple[Any, dict[str, Any]]:
    """The source and options that a run of this launch on `target` would compile."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {"num_warps": launch.num_warps}, bound, specialization, {}
    )
    return ASTSource(kernel, signature, constants, attributes), dict(vars(options))


def compile_launch(launch: Any, target: Any) -> MachineCode:
    """Compile one launch for a target and read its machine code."""
    import triton

    source, options = specialize(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def specimens(ops: Sequence[str] = OPS, dtypes: Sequence[str] = ("bf16", "fp16")) -> list[Specimen]:
    """What the table shows: every size at a pitch of 8, and narrower pitches for RMS norm."""
    aligned = [
        Specimen(op, size, dtype)
        for op in ops
        for size in (HEAD_SIZES if op == "qk_norm" else HIDDEN_SIZES)
        for dtype in dtypes
    ]
    narrow = [
        Specimen("rms_norm", size, dtypes[0], pitch) for size in (128, 4096) for pitch in (4, 2, 1)
    ]
    return aligned + (narrow if "rms_norm" in ops else [])


COLUMNS = (
    "kernel",
    "hidden",
    "dtype",
    "pitch",
    "tile",
    "warps",
    "registers",
    "spills",
    "shared",
    "loads",
    "stores",
)
HEADER = TextTable(COLUMNS, ()).markdown()


def table_row(specimen: Specimen, target: Any) -> str:
    launch = plan(specimen, target.warp_size)
    tile = f"{launch.arguments['ROWS']} x {launch.arguments['BLOCK']}"
    pitch = f"{specimen.pitch}n"
    first = (specimen.op, specimen.hidden_size, specimen.dtype, pitch, tile, launch.num_warps)
    return _row(first, compile_launch(launch, target))


def _row(first: Sequence[Any], code: MachineCode) -> str:
    widths = map(_widths, (code.loads, code.stores))
    return markdown_line((*first, code.registers, code.spills, code.shared, *widths))


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{n} x {bits}" for bits, n in sorted(counts.items(), reverse=True))


def liger_plan(specimen: Specimen) -> Any:
    """What Liger-Kernel's RMS norm launches for many dense rows of this size."""
    from fixpass.runtime.kernels.launch import Launch

    rms_norm = import_module("liger_kernel.ops.rms_norm")
    settings = import_module("liger_kernel.ops.utils").calculate_settings

    dtype, hidden_size = DTYPES[specimen.dtype], specimen.hidden_size
    x = torch.empty(2**27 // hidden_size, hidden_size, dtype=dtype, device="meta")
    weight = torch.empty(hidden_size, dtype=dtype, device="meta")
    scale = torch.empty(x.shape[0], device="meta")
    block, num_warps = settings(hidden_size)
    arguments: dict[str, Any] = {}
    for name, tensor in (("Y", x), ("X", x), ("W", weight), ("RSTD", scale)):
        arguments |= {f"{name}_ptr": tensor, f"{name}_row_stride": tensor.stride(0)}
    arguments |= {"n_cols": hidden_size, "eps": 1e-6, "offset": 0.0, "casting_mode": 0}
    arguments |= {"elementwise_affine": True, "BLOCK_SIZE": block}
    kernel = rms_norm._rms_norm_forward_kernel
    if block <= 256:
        kernel = rms_norm._block_rms_norm_forward_kernel
        arguments |= {"BLOCK_ROW": 16, "n_rows": x.shape[0]}
    return Launch(kernel, (1,), arguments, num_warps, x.device)


def liger_table(target_name: str) -> Iterator[str]:
    """Liger-Kernel's RMS norm, which takes dense rows only, compiled in the same way."""
    target = gpu_target(target_name)
    yield f"\nLiger-Kernel {metadata.version('liger-kernel')}, dense rows:\n"
    yield HEADER
    for size in HIDDEN_SIZES:
        launch = liger_plan(Specimen("liger rms_norm", size))
        tile = f"{launch.arguments.get('BLOCK_ROW', 1)} x {launch.arguments['BLOCK_SIZE']}"
        first = ("liger rms_norm", size, "bf16", "dense", tile, launch.num_warps)
        yield _row(first, compile_launch(launch, target))


def table(target_name: str, ops: Sequence[str] = OPS) -> Iterator[str]:
    """The machine-code table of one target, line by line as kernels get compiled."""
    target = gpu_target(target_name)
    yield f"\n## {target_name}\n"
    yield HEADER
    for specimen in specimens(ops):
        yield table_row(specimen, target)
    if "rms_norm" in ops and find_spec("liger_kernel"):
        yield from liger_table(target_name)


def kernels_command(
    target: str,
    ops: Sequence[str] = OPS,
    show: Callable[[str], None] = print,
    write: Path | None = None,
) -> int:
    """Print the tables of a target, or of all documented ones for "all", line by line.

    With `write`, the tables replace the text behind the marker of that document instead.
    """
    names = DOCUMENTED_TARGETS if target == "all" else (target,)
    lines = (line for name in names for line in table(name, ops))
    if write is None:
        for line in lines:
            show(line)
        return 0
    prose = write.read_text().split(MARKER)[0]
    made_with = f"\nCompiled with Triton {metadata.version('triton')}."
    page = "\n".join([prose + MARKER, made_with, *lines, ""])
    write.write_text(page)
    # The HTML report shows the rows of the chosen kernels, for each documented target.
    if target == "all":
        TABLE.write_text(to_csv(read_table(page)))
    return 0


def read_table(page: str) -> list[dict[str, str]]:
    """Our kernels' rows on a page that `--write` made, each with its target and Triton."""
    triton = page.partition("Compiled with Triton ")[2].partition(".\n")[0]
    target, rows = "", []
    for line in page.partition(MARKER)[2].splitlines():
        target = line[3:] if line.startswith("## ") else target
        cells = dict(
            zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=False)
        )
        if cells["kernel"] in OPS:
            rows.append({"target": target, **cells, "triton": triton})
    return rows


def to_csv(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as the text of `fixpass/report/machine_code.csv`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv: Sequence[str]) -> int:
    """Run the command line; an unknown target is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks machine_code",
        description=__doc__,
        epilog="example: python -m benchmarks machine_code --target cuda:sm_90",
    )
    parser.add_argument(
        "--target", default="all", help="a target, or all documented ones (default)"
    )
    parser.add_argument("--write", type=Path, help="the document whose tables are replaced")
    arguments = parser.parse_args(argv)
    try:
        return kernels_command(arguments.target, write=arguments.write)
    except ConfigError as error:
        print(f"python -m benchmarks machine_code: {error}", file=sys.stderr)
        return 2

"""Registers, spills, shared memory and widths of accesses, read from the assembly of a kernel.

NVIDIA's binaries go through nvdisasm and cuobjdump; AMD's assembly is text. Nothing is run.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MachineCode:
    """What the assembly of one kernel says; widths are in bits, with how often each occurs."""

    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]

    def narrowest(self) -> int:
        return min((*self.loads, *self.stores))


def read_cubin(cubin: bytes, dynamic_shared: int) -> MachineCode:
    """Machine code of an NVIDIA kernel from its binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
    return read_sass(sass, usage, dynamic_shared)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_sass(sass: str, usage: str, dynamic_shared: int = 0) -> MachineCode:
    """Machine code of an NVIDIA kernel from nvdisasm's text and cuobjdump's resource usage."""
    counts: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for op, suffixes in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", sass):
        widths = [int(n) for n in re.findall(r"\.[US]?(8|16|64|128|256)\b", suffixes)]
        counts[op][widths[0] if widths else 32] += 1
    return MachineCode(
        registers=_number(r"REG:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=_number(r"SHARED:(\d+)", usage) + dynamic_shared,
        loads=dict(counts["LDG"]),
        stores=dict(counts["STG"]),
    )


def read_amdgcn(assembly: str, dynamic_shared: int = 0) -> MachineCode:
    """Machine code of an AMD kernel from its assembly text."""
    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for op, kind in re.findall(r"\b(?:buffer|global|flat)_(load|store)_(\w+)", assembly):
        counts[op][_amd_width(kind)] += 1
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
        shared=_number(r"\.group_segment_fixed_size:\s+(\d+)", assembly) + dynamic_shared,
        loads=dict(counts["load"]),
        stores=dict(counts["store"]),
    )


def _amd_width(kind: str) -> int:
    # gfx12 names the bits, as in `b128`; gfx9 names doublewords, as in `dwordx4`.
    if bits := re.match(r"[biu](\d+)$", kind):
        return int(bits[1])
    dwords = re.match(r"dwordx?(\d*)", kind)
    if dwords:
        return 32 * int(dwords[1] or 1)
    return 8 if "byte" in kind else 16


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembly says nothing about {pattern}")
    return int(found[1])

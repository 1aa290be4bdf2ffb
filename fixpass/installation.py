"""`python -m fixpass doctor`: the state of this installation, and the way out where a part fails.

Each part is tried, not only looked for: the C++ is built, and devices are asked. Nothing is
installed or deleted.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

import fixpass
from fixpass.config import Config, faulty_variables, set_variables
from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import add_kernels, rows_of
from fixpass.lowering.target import FALLBACK, Target
from fixpass.pipelines import installed_kernels, target_here
from fixpass.report.summary import readable
from fixpass.runtime import extension
from fixpass.runtime.errors import UnsupportedTorchError
from fixpass.runtime.providers import TRITON
from fixpass.runtime.versions import check_torch

LIBRARIES = ("triton", "aiter", "vllm", "sglang", "flashinfer", "transformers")
_PACKAGES = {"flashinfer": "flashinfer-python", "aiter": "amd-aiter"}
"""The name of a library on the package index, where it is another one."""
_OF_NAMESPACE = {"_C": "vllm", "sgl_kernel": "sglang", TRITON: "triton"}
"""The library behind the `needs` of a kernel, where the names differ."""
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = 1 << 28
"""Bytes of shared memory below which symmetric memory on CPU is said to be short."""


@dataclass(frozen=True)
class PartFinding:
    """One part of the installation."""

    state: Literal["works", "absent", "broken"]
    name: str
    detail: str
    way_out: str = ""
    """What to do; empty where there is nothing to do."""


def findings() -> Iterator[PartFinding]:
    """Try each part of the installation, one after the other."""
    yield _torch()
    yield _compiler()
    yield _extension()
    yield from map(_library, LIBRARIES)
    yield from _devices()
    if _SHARED_MEMORY.is_dir():
        yield _shared_memory()
    yield from _caches()
    yield from _variables()


def known_kernels() -> tuple[Kernel, ...]:
    """Our kernels and those of installed packages."""
    add_kernels(installed_kernels())
    return rows_of()


def _torch() -> PartFinding:
    detail = f"{torch.__version__} with fixpass {fixpass.__version__}"
    try:
        check_torch()
    except UnsupportedTorchError as error:
        return PartFinding("broken", "torch", detail, str(error))
    return PartFinding("works", "torch", detail)


def _compiler() -> PartFinding:
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        way_out = "install a C++ compiler such as g++, or set CXX"
        return PartFinding("broken", "C++ compiler", "Inductor finds none", way_out)
    return PartFinding("works", "C++ compiler", str(compiler))


def _extension() -> PartFinding:
    """Build the smallest of our C++ parts, or load it where an earlier process has built it."""
    start = perf_counter()
    loaded = extension.load("tile_copy")
    seconds = f"{perf_counter() - start:.1f} s"
    if loaded.library is None:
        way_out = "install a C++ compiler, and set TORCH_EXTENSIONS_DIR to a writable folder"
        return PartFinding("broken", "C++ extension", f"not built: {loaded.reason}", way_out)
    return PartFinding("works", "C++ extension", f"built, or loaded from the cache, in {seconds}")


def _library(name: str) -> PartFinding:
    """A library by its version, with the kernels that it computes and the sources read for them."""
    rows = [row for row in known_kernels() if _library_of(row) == name]
    kernels = ", ".join(dict.fromkeys(row.name for row in rows))
    package = _PACKAGES.get(name, name)
    try:
        found = version(package)
    except PackageNotFoundError:
        way_out = f"pip install {package}" if kernels or name == "transformers" else ""
        return PartFinding(
            "absent", name, f"for {kernels}" if kernels else "not installed", way_out
        )
    if not rows:
        return PartFinding("works", name, found)
    if any(row.is_installed for row in rows):
        sources = "; ".join(dict.fromkeys(row.contract.source for row in rows))
        return PartFinding("works", name, f"{found}: {kernels} [{sources}]")
    needs = next((row.needs for row in rows), "")
    way_out = f"{kernels} need {needs}"
    return PartFinding("absent", name, f"{found}, but its kernels cannot be called here", way_out)


def _library_of(row: Kernel) -> str:
    namespace = row.needs.partition("::")[0]
    return _OF_NAMESPACE.get(namespace, namespace)


def _devices() -> Iterator[PartFinding]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        yield _device(target_here(device, Config()), str(device))


def _device(target: Target, name: str) -> PartFinding:
    kernels = [kernel for kernel in target.kernels if kernel not in target.missing]
    detail = f"{target}: {', '.join(kernels)}"
    if target.kernels == (FALLBACK,) and target.device_type != "cpu":
        way_out = "name your own target in the option `targets` for more kernels"
        return PartFinding("works", name, detail, way_out)
    missing = f"not installed: {', '.join(target.missing)}" if target.missing else ""
    return PartFinding("works", name, detail, missing)


def _shared_memory() -> PartFinding:
    usage = shutil.disk_usage(_SHARED_MEMORY)
    detail = f"{readable(usage.free)} free of {readable(usage.total)}"
    if usage.free < _LEAST_SHARED:
        way_out = "all-reduces of ranks on one CPU host may not fit: docker run --shm-size=1g"
        return PartFinding("broken", str(_SHARED_MEMORY), detail, way_out)
    return PartFinding("works", str(_SHARED_MEMORY), detail)


def _caches() -> Iterator[PartFinding]:
    folders = {"inductor": cache_dir(), "triton": triton_cache_dir(0)}
    folders["extension"] = str(extension.cache_folder())
    for name, folder in folders.items():
        size = sum(path.lstat().st_size for path in _files(Path(folder)))
        yield PartFinding("works", f"{name} cache", f"{readable(size)} in {folder}")


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(root, name)).is_file())


def _variables() -> Iterator[PartFinding]:
    faults = faulty_variables()
    for name, value in set_variables().items():
        if name in faults:
            yield PartFinding("broken", name, f"set to {value!r}", faults[name])
        else:
            yield PartFinding("works", name, f"set to {value!r}")

"""Builds and loads fixpass's C++: `load("tile_copy")` compiles csrc/tile_copy.cpp once a machine.

Each source file becomes a shared library of its own, so the first use of a small one does not wait
for a large one. Libraries lie in PyTorch's cache for extensions (`TORCH_EXTENSIONS_DIR`), keyed by
sources, flags, compiler, processor and torch version.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

CSRC = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno")
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10")
CPUINFO = Path("/proc/cpuinfo")
_PROCESSOR = ("vendor", "cpu family", "model", "flags", "features", "cpu implementer", "cpu part")
SECONDS = 600
"""A compiler that runs longer than this counts as one that failed."""


@dataclass(frozen=True)
class Extension:
    """A library that was loaded, or the reason why there is none."""

    library: ctypes.CDLL | None
    """Its `extern "C"` functions; torch knows its operators already. None: it cannot be built."""
    reason: str = ""
    """Why it cannot be built, in one line."""


@cache
def load(name: str, *, uses_torch: bool = False) -> Extension:
    """The library of csrc/`name`.cpp and the headers in csrc/`name`/.

    The first process that asks compiles it; the others wait, then find it in the cache. Where it
    cannot be built, there is one warning a process, and callers go on without it.

    Args:
        name: The source's file name, without the suffix.
        uses_torch: Whether the source includes PyTorch's headers.

    """
    try:
        return Extension(ctypes.CDLL(str(_cached(name, uses_torch))))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        reason = lines[0].strip() if lines else f"{error.cmd[0]} exited with {error.returncode}"
    # No compiler, a compiler that hangs, a cache folder that cannot be written to.
    except (OSError, NotImplementedError, subprocess.SubprocessError) as error:
        reason = str(error)
    warnings.warn(
        f"fixpass runs without its C++ part {name!r}, which could not be built: {reason}. Install "
        "a C++ compiler (or name one in CXX), and set TORCH_EXTENSIONS_DIR to a writable folder",
        stacklevel=2,
    )
    return Extension(None, reason)


def _cached(name: str, uses_torch: bool) -> Path:
    """The path of the library, which is compiled where the cache does not hold it."""
    # Imports setuptools in some releases, which only those pay who need the C++.
    from torch.utils import cpp_extension

    wanted = cpp_extension.get_cxx_compiler()
    compiler = shutil.which(wanted)
    if compiler is None:
        raise FileNotFoundError(f"there is no C++ compiler {wanted!r}")
    flags: tuple[str, ...] = FLAGS
    if uses_torch:
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        paths = (*cpp_extension.include_paths(), sysconfig.get_path("include"))
        includes = [f"-isystem{path}" for path in paths]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        flags += ("-fopenmp", abi, *includes, *libraries, *LIBRARIES)
    key = _key(name, compiler, flags)
    library = cache_folder() / f"{name}-{key}{cpp_extension.LIB_EXT}"
    if not library.exists():
        _compile(library, name, compiler, flags)
    return library


def cache_folder() -> Path:
    """The folder of the built libraries; it is made where there is none."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("fixpass", verbose=False))


def _compile(library: Path, name: str, compiler: str, flags: tuple[str, ...]) -> None:
    with FileLock(f"{library}.lock"):
        if library.exists():
            return
        unfinished = library.with_suffix(".unfinished")
        # Libraries follow the source that needs them.
        command = [compiler, str(CSRC / f"{name}.cpp"), *flags, "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        # A library has its name only when it is whole, also where a build was killed.
        os.replace(unfinished, library)


def _key(name: str, compiler: str, flags: tuple[str, ...]) -> str:
    resolved = Path(compiler).resolve()
    facts = (flags, torch.__version__, str(resolved), resolved.stat().st_size, _processor())
    digest = hashlib.sha256(repr(facts).encode())
    for path in (CSRC / f"{name}.cpp", *sorted((CSRC / name).glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What `-march=native` depends on: a library of another processor is never loaded here."""
    first, _, _ = CPUINFO.read_text().partition("\n\n")
    return [line for line in first.lower().splitlines() if line.startswith(_PROCESSOR)]

"""The C++ part: built once a machine with torch's extension tooling, then loaded from its cache.

The cache is torch's own (`TORCH_EXTENSIONS_DIR`), one folder for each version of the sources, of
torch and of the processor. Without a compiler there is a reason instead of a library.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno")


@cache
def load() -> str:
    """Load the library into this process; empty, or why there is none."""
    try:
        torch.ops.load_library(str(_built()))
    # A compiler that is missing, broken or too old, a full disk: each is a reason to go without.
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return f"its C++ part could not be built: {first[0] if first else type(error).__name__}"
    return ""


def _built() -> Path:
    """The path of the library, which is built where it is not there."""
    # It imports setuptools, a third of a second that only those pay who have ranks.
    from torch.utils import cpp_extension

    name = f"fixpass_symmetric_memory_{_version()}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    library = folder / f"{name}{cpp_extension.LIB_EXT}"
    with FileLock(folder / ".fixpass.lock"):
        if not library.exists():
            # What a build that was killed left behind would make torch wait for it for ever.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(SOURCES / "ops.cpp")],
                extra_cflags=list(FLAGS),
                build_directory=str(folder),
                is_python_module=False,
            )
    return library


def _version() -> str:
    digest = hashlib.sha256(repr((FLAGS, torch.__version__, _processor())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")

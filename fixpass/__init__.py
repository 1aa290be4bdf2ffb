"""fixpass: a PyTorch compiler backend that makes models and kernels agree on memory layouts.

`import fixpass` loads neither torch nor a submodule. Each name and each submodule, such as
`fixpass.weights`, is loaded on first use.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fixpass.backend import compile, last_reports
    from fixpass.config import Config
    from fixpass.explanation import explain
    from fixpass.lowering.contract import Contract, Kernel
    from fixpass.lowering.target import Target
    from fixpass.passes.base import Pass, PassResult, Remark
    from fixpass.passes.pipeline import Pipeline
    from fixpass.passes.remarks import Report
    from fixpass.passes.rewrite import Editor, Match, Missed, Rewrite, apply_rewrite
    from fixpass.runtime.errors import FixpassError

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Contract",
    "Editor",
    "FixpassError",
    "Kernel",
    "Match",
    "Missed",
    "Pass",
    "PassResult",
    "Pipeline",
    "Remark",
    "Report",
    "Rewrite",
    "Target",
    "apply_rewrite",
    "compile",
    "explain",
    "last_reports",
]

_MODULES = {
    "fixpass.backend": ("compile", "last_reports"),
    "fixpass.config": ("Config",),
    "fixpass.explanation": ("explain",),
    "fixpass.lowering.contract": ("Contract", "Kernel"),
    "fixpass.lowering.target": ("Target",),
    "fixpass.passes.base": ("Pass", "PassResult", "Remark"),
    "fixpass.passes.pipeline": ("Pipeline",),
    "fixpass.passes.remarks": ("Report",),
    "fixpass.passes.rewrite": ("Editor", "Match", "Missed", "Rewrite", "apply_rewrite"),
    "fixpass.runtime.errors": ("FixpassError",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = tuple(found.name for found in iter_modules(__path__) if found.name[0] != "_")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

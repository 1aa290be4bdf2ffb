"""fixpass: a PyTorch compiler backend that settles disagreements between models and kernels."""

from fixpass.backend import compile, last_reports
from fixpass.config import Config
from fixpass.explain import explain
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult, Remark
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.report import Report
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

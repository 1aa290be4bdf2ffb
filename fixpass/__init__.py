"""fixpass: a PyTorch compiler backend that settles disagreements between models and kernels."""

from fixpass.backend import compile, last_reports
from fixpass.config import Config
from fixpass.explain import explain
from fixpass.passes.base import Pass, PassResult, Remark
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.report import Report
from fixpass.runtime.errors import FixpassError

__version__ = "0.1.0"

__all__ = [
    "Config",
    "FixpassError",
    "Pass",
    "PassResult",
    "Pipeline",
    "Remark",
    "Report",
    "compile",
    "explain",
    "last_reports",
]

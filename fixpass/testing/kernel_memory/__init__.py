"""Run a kernel launcher in Triton's interpreter and report every byte it touched.

    report = trace_memory(rms_norm, x, weight, 1e-6, out=out)
    assert not report.faults, report
    assert report.moved(reads=("x",), writes=("out",)) == 1.0

It proves nothing about other shapes than the one run, and nothing about time.
"""

from fixpass.testing.kernel_memory.memory_report import Fault, MemoryReport, ViewTraffic
from fixpass.testing.kernel_memory.trace import trace_memory

__all__ = ["Fault", "MemoryReport", "ViewTraffic", "trace_memory"]

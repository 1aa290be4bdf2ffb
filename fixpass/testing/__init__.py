"""For authors of passes and models: trace a graph, print it, compare compiled code with eager.

`trace` gives the functional ATen graph that the passes see, `text` prints it for an inline
snapshot, `assert_same` compares values, dtypes, strides and gradients of two functions, and
`assert_fired` fails where a model's norm stops to get the kernel that it had.
"""

from fixpass.report.expected import assert_fired
from fixpass.testing.compare import assert_same
from fixpass.testing.inputs import bf16, f16, f32
from fixpass.testing.tracing import text, trace

__all__ = ["assert_fired", "assert_same", "bf16", "f16", "f32", "text", "trace"]

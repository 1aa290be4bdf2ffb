"""Compile with the backend fixpass so that every pass is checked and a fault raises.

The rewritten graphs run op by op: only Inductor's C++ is left out.
"""

import torch

EAGER = {"lower": "eager", "verify": True, "strict": True}


def compiled(fn, dynamic=None, fullgraph=True, **options):
    return torch.compile(
        fn, backend="fixpass", dynamic=dynamic, fullgraph=fullgraph, options=EAGER | options
    )


def compiled_anew(fn, **options):
    """The same, with all that Dynamo knows of earlier compiles forgotten."""
    torch._dynamo.reset()
    return compiled(fn, **options)

"""Part compile: does it start at all? One norm on a slice of a packed tensor, compiled."""

import torch
from torch import Tensor
from torch.nn import functional as F

import fixpass
from benchmarks.gpu.part import Part, relative_error
from fixpass.backend import fixpass as backend

BF16_ERROR = 1.2e-2


def q_norm(packed: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(packed[:, :512].unflatten(1, (-1, 128)), (128,), weight, 1e-6)


def run(part: Part) -> None:
    packed = torch.randn(64, 768, device=part.device, dtype=torch.bfloat16)
    weight = torch.randn(128, device=part.device, dtype=torch.bfloat16)
    want = q_norm(packed.double(), weight.double())
    for name, options in (("default", {}), ("inductor", {"norm_kernels": ("inductor",)})):
        with part.attempt(f"one norm, kernels {name}"), torch.no_grad():
            torch._dynamo.reset()
            compiled = torch.compile(q_norm, backend=backend, options=options)
            error = relative_error(compiled(packed, weight), want)
            report = str(fixpass.last_reports()[-1])
            correct = error < BF16_ERROR
            part.add(f"one norm, kernels {name}", error=error, correct=correct, report=report)

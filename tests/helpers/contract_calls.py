"""Run norms of every layout with one library's kernels, and count the results that are wrong.

python contract_calls.py eager|graph|inductor|verify KERNEL|all [static|dynamic]
"""

import sys

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from fixpass.eager_kernels import wrap
from fixpass.runtime.errors import KernelError
from fixpass.runtime.opaque_norms import OPAQUE_NORMS
from helpers import pointer_kernels

ROWS, HIDDEN = 6, 64
EPS = 1e-6
LIBRARIES = (
    ("aiter_rms_norm", "aiter_layer_norm", "aiter_add_rms_norm"),
    ("vllm_rms_norm", "vllm_add_rms_norm"),
    ("flashinfer_rms_norm", "flashinfer_add_rms_norm"),
)
# From 6 * 2 * 2 * 64 elements to rows of 64, as models lay them out.
LAYOUTS = {
    "dense": lambda a: a[:384].view(6, 64),
    "computed and transposed": lambda a: a[:384].view(64, 6).sin().t(),
    "transposed": lambda a: a[:384].view(64, 6).t(),
    "transposed and copied": lambda a: a[:384].view(64, 6).cos().t().contiguous(),
    "columns of a packed projection": lambda a: a.view(6, 256)[:, 64:128],
    "heads of a packed projection": lambda a: a.view(6, 256)[:, 64:192].view(6, 2, 64),
    "heads before tokens": lambda a: a.view(4, 6, 64).transpose(0, 1),
    "permuted and back": lambda a: (
        a.view(2, 3, 4, 64).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) + 1
    ),
    "every second row": lambda a: a.view(24, 64)[::2],
    "expanded": lambda a: a[:64].view(1, 64).expand(6, 64),
    "odd offset": lambda a: a[1:385].view(6, 64),
    "odd offset and cloned": lambda a: a[1:385].view(6, 64).clone(),
    "odd pitch": lambda a: a[: 6 * 67].view(6, 67)[:, :64],
    "size 1 in the middle": lambda a: a[:384].view(1, 6, 64).transpose(0, 1),
    "size 1 in front": lambda a: a[:384].view(6, 64)[None],
    "one row": lambda a: a[128:192].view(1, 64),
    "no rows": lambda a: a.view(24, 64)[:0],
    "3-D": lambda a: a[:384].view(2, 3, 64).exp(),
    "4-D, innermost first": lambda a: a.view(64, 2, 3, 4).permute(3, 2, 1, 0),
}
VECTORS = {
    "dense": lambda v: v[:64],
    "every second element": lambda v: v[:128:2],
    "expanded": lambda v: v[:1].expand(64),
    "odd offset": lambda v: v[1:65],
    "odd offset and cloned": lambda v: v[1:65].clone(),
    "computed": lambda v: v[:64] * 2,
}


def norm(op, before, x, residual, weight, bias):
    """The norm as a model spells it: (norm, and the sum where there is one)."""
    if op == "layer_norm":
        return (F.layer_norm(x, (HIDDEN,), weight, bias, EPS),)
    total = x + residual if op == "add_rms_norm" else x
    h = total.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    y = weight * h.to(x.dtype) if before else (weight * h).to(x.dtype)
    return (y, total) if op == "add_rms_norm" else (y,)


def truth(op, x, residual, weight, bias):
    x, residual, weight, bias = (t.double() for t in (x, residual, weight, bias))
    return norm(op, False, x, residual, weight, bias)


def cases(quick):
    """(name, layout of x and the residual, layout of weight and bias)."""
    for name, layout in LAYOUTS.items():
        for kind, vector in VECTORS.items():
            if not quick or kind == "dense" or name in ("dense", "computed and transposed"):
                yield f"{name}, weight {kind}", layout, vector


def operands():
    torch.manual_seed(0)
    sizes = (ROWS * 256, ROWS * 256, 128, 128)
    return [torch.randn(size).bfloat16() for size in sizes]


def wrong_ones(names, got, want):
    wrong = 0
    for name, results, right in zip(names, got, want, strict=True):
        for mine, theirs in zip(results, right, strict=True):
            if not torch.allclose(mine.detach().double(), theirs, rtol=0.02, atol=0.02):
                wrong += 1
                print(f"wrong: {name}: {(mine.detach() - theirs).abs().max()}")
    return wrong


def compiled(kernels, ops, lower, dynamic, quick):
    """All cases in one graph."""
    before = kernels[0].startswith("vllm")
    todo = [(op, *case) for op in ops for case in cases(quick)]

    def model(a, r, w, b):
        return [
            norm(op, before, layout(a), layout(r), vector(w), vector(b))
            for op, _, layout, vector in todo
        ]

    tensors = operands()
    want = [
        truth(op, layout(tensors[0]), layout(tensors[1]), vector(tensors[2]), vector(tensors[3]))
        for op, _, layout, vector in todo
    ]
    run = torch.compile(
        model,
        backend="fixpass",
        dynamic=dynamic,
        options={"norm_kernels": kernels, "lower": lower, "verify": True, "strict": True},
    )
    with torch.no_grad():
        got = run(*tensors)
    return wrong_ones([f"{op} of {name}" for op, name, *_ in todo], got, want)


def eager(kernel):
    """Each wrapped op behind the kernel, on x and on results that lie as x does."""
    wrong = 0
    for row in (row for row in OPAQUE_NORMS if row.kernel == kernel):
        if row.name not in pointer_kernels.SCHEMAS:
            continue
        run = wrap(pointer_kernels.SCHEMAS[row.name][1], row.name)
        for name, layout, vector in cases(False):
            a, r, w, b = operands()
            given = {
                "x": layout(a),
                "residual": layout(r),
                "weight": vector(w),
                "bias": vector(b),
                "eps": EPS,
                "out": torch.empty(layout(a).shape, dtype=a.dtype),
                "total": torch.empty(layout(a).shape, dtype=a.dtype),
            }
            if name.startswith("expanded") and "total" in row.roles:
                continue  # One row cannot be written as six.
            want = truth(
                row.op, *(given[role].clone() for role in ("x", "residual", "weight", "bias"))
            )
            in_place = row.roles.get("out") == row.x
            if in_place:
                given |= {"out": given["x"], "total": given["residual"]}
            roles = {argument: role for role, argument in row.roles.items()}
            args = [given[roles[argument]] for argument in row.arguments if argument in roles]
            args += [True] if "enable_pdl" in row.arguments else []
            result = run(*args)
            places = [given[role] for role in ("out", "total") if role in row.roles]
            wrong += wrong_ones([name], [tuple(places) or (result,)], [want])
    return wrong


def verified(kernel):
    """A call with a layout that no contract allows, as compiled code might make it by mistake."""
    compiled((kernel,), ["rms_norm"], "eager", False, quick=True)
    x = torch.randn(64, 6).bfloat16().t()
    try:
        torch.ops.fixpass.rms_norm(x, torch.ones(64).bfloat16(), None, EPS, kernel_name=kernel)
    except KernelError as error:
        print(error)
    return 0


def main(way, kernel, sizes="static"):
    pointer_kernels.register()
    if way == "verify":
        return verified(kernel)
    if way == "eager":
        wrong = eager(kernel)
    else:
        libraries = LIBRARIES if kernel == "all" else ((kernel,),)
        wrong = 0
        for names in libraries:
            ops = [name.partition("_")[2] for name in names]
            wrong += compiled(
                names,
                ops,
                "inductor" if way == "inductor" else "eager",
                sizes == "dynamic",
                quick=way == "inductor",
            )
    hits = counters["inductor"]["fxgraph_cache_hit"]
    print(f"{len(pointer_kernels.CALLS)} calls, {wrong} wrong, {hits} graphs from the cache")
    return int(bool(wrong or not pointer_kernels.CALLS))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Run norms of every layout with one library's kernels, and count the results that are wrong.

python contract_calls.py eager|graph|inductor|train|train-inductor|verify KERNEL|all [static|dynamic]

A kernel with ":2026" behind its name is that of aiter of 2026.
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from fixpass.eager_kernels import wrap
from fixpass.lowering import constraints, contract_table
from fixpass.lowering.contract import Contract
from fixpass.lowering.contract_table import kernel_of
from fixpass.runtime.errors import KernelError
from fixpass.runtime.opaque_norms import OPAQUE_NORMS
from helpers import pointer_kernels

ROWS, HIDDEN = 6, 64
LAYOUT_CONSTRAINTS = (
    constraints.AlignedVector,
    constraints.Dense,
    constraints.Dense2D,
    constraints.LastStridesDivisible,
    constraints.NotEmpty,
    constraints.Rank,
    constraints.RowPitch,
    constraints.UnitLastStride,
)
EPS = 1e-6
LIBRARIES = (
    ("aiter_rms_norm", "aiter_layer_norm", "aiter_add_rms_norm"),
    ("vllm_rms_norm", "vllm_add_rms_norm"),
    ("flashinfer_rms_norm", "flashinfer_add_rms_norm"),
)


def flat(a, rows, start=0):
    """The elements of `rows` rows behind each other; `rows` may be a symbolic number."""
    return a.view(-1)[start : start + rows * HIDDEN]


# From n rows of 256 elements to rows of 64, as models lay them out.
LAYOUTS = {
    "dense": lambda a: flat(a, a.shape[0]).view(-1, 64),
    "computed and transposed": lambda a: flat(a, a.shape[0]).view(64, -1).sin().t(),
    "transposed": lambda a: flat(a, a.shape[0]).view(64, -1).t(),
    "transposed and copied": lambda a: flat(a, a.shape[0]).view(64, -1).cos().t().contiguous(),
    "columns of a packed projection": lambda a: a[:, 64:128],
    "heads of a packed projection": lambda a: a[:, 64:192].view(-1, 2, 64),
    "heads before tokens": lambda a: a.view(4, -1, 64).transpose(0, 1),
    "permuted and back": lambda a: (
        a.view(-1, 2, 2, 64).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) + 1
    ),
    "every second column": lambda a: a[:, 64:192:2],
    "every second row": lambda a: a.view(-1, 64)[::2],
    "expanded": lambda a: flat(a, 1).view(1, 64).expand(a.shape[0], 64),
    "odd offset": lambda a: flat(a, a.shape[0], 1).view(-1, 64),
    "odd offset and cloned": lambda a: flat(a, a.shape[0], 1).view(-1, 64).clone(),
    "odd pitch": lambda a: a.view(-1)[: a.shape[0] * 67].view(-1, 67)[:, :64],
    "size 1 in the middle": lambda a: flat(a, a.shape[0]).view(1, -1, 64).transpose(0, 1),
    "size 1 in front": lambda a: flat(a, a.shape[0]).view(-1, 64)[None],
    "one row": lambda a: flat(a, 1, 128).view(1, 64),
    "no rows": lambda a: a.view(-1, 64)[:0],
    "3-D": lambda a: flat(a, 2 * a.shape[0]).view(2, -1, 64).exp(),
    "4-D, innermost first": lambda a: a.view(64, 2, -1, 2).permute(3, 2, 1, 0),
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


def called(op, before, x, residual, weight, bias):
    """The norm as our op, which an engine's op becomes: it has gradients and a kernel."""
    run = getattr(torch.ops.fixpass, op)
    if op == "layer_norm":
        return (run(x, weight, bias, EPS),)
    steps = {"norm_dtype": x.dtype} if before else {}
    rows = (x, residual) if op == "add_rms_norm" else (x,)
    found = run(*rows, weight, None, EPS, **steps)
    return found if isinstance(found, tuple) else (found,)


def operands(rows=ROWS):
    torch.manual_seed(rows)
    sizes = ((rows, 256), (rows, 256), (128,), (128,))
    return [torch.randn(size).bfloat16() for size in sizes]


def wrong_ones(names, got, want):
    wrong = 0
    for name, results, right in zip(names, got, want, strict=True):
        for mine, theirs in zip(results, right, strict=True):
            if not torch.allclose(mine.detach().double(), theirs, rtol=0.02, atol=0.02):
                wrong += 1
                print(f"wrong: {name}: {(mine.detach() - theirs).abs().max()}")
    return wrong


def gradients(results, groups):
    """The gradients of one loss over the results of all cases, for each case by itself."""
    generator = torch.Generator().manual_seed(0)
    flats = [result.double().flatten() for case in results for result in case]
    loss = sum(flat @ torch.rand(len(flat), generator=generator).double() for flat in flats)
    leaves = [leaf for group in groups for leaf in group]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [found[i : i + 4] for i in range(0, len(found), 4)]


def compiled(kernels, ops, lower, dynamic, quick, training=False):
    """All cases in one graph; a dynamic graph is called with two numbers of rows."""
    before = kernels[0].startswith("vllm")
    todo = [(op, *case) for op in ops for case in cases(quick)]
    names = [f"{op} of {name}" for op, name, *_ in todo]

    def model(groups):
        make = called if training else norm
        return [
            make(op, before, layout(a), layout(r), vector(w), vector(b))
            for (op, _, layout, vector), (a, r, w, b) in zip(todo, groups, strict=True)
        ]

    run = torch.compile(
        model,
        backend="fixpass",
        dynamic=None if dynamic else False,
        options={"norm_kernels": kernels, "lower": lower, "verify": True, "strict": True},
    )
    wrong = 0
    for rows in (ROWS, ROWS + 4) if dynamic else (ROWS,):
        with (
            torch._dynamo.config.patch(error_on_recompile=rows != ROWS),
            torch.set_grad_enabled(training),
        ):
            wrong += _compare(run, todo, names, operands(rows), dynamic, training)
    return wrong


def _compare(run, todo, names, tensors, dynamic, training):
    # Cases that share a leaf would add their gradients in 16 bits, and each sum is rounded: the
    # error of about 30 sums is larger than that of any norm, in eager mode too.
    groups = [[t.clone().requires_grad_() for t in tensors] if training else tensors for _ in todo]
    exact = [[t.detach().double().requires_grad_(training) for t in group] for group in groups]
    for group in groups:
        for t in group[:2] if dynamic else ():
            torch._dynamo.mark_dynamic(t, 0)
    got = run(groups)
    want = [
        truth(op, layout(a), layout(r), vector(w), vector(b))
        for (op, _, layout, vector), (a, r, w, b) in zip(todo, exact, strict=True)
    ]
    wrong = wrong_ones(names, got, want)
    if training:
        pairs = zip(names, gradients(got, groups), gradients(want, exact), strict=True)
        for name, mine, right in pairs:
            mine, right = ([g for g in part if g is not None] for part in (mine, right))
            # A sum over rows has the rounding of its largest terms.
            scale = [g.abs().max().clamp(min=1) for g in right]
            mine, right = ([g / s for g, s in zip(x, scale, strict=True)] for x in (mine, right))
            wrong += wrong_ones([f"gradient of {name}"], [mine], [right])
    return wrong


def eager(kernel):
    """Each wrapped op behind the kernel, on x and on results that lie as x does."""
    wrong = 0
    for row in (row for row in OPAQUE_NORMS if row.kernel == kernel):
        if row.name not in pointer_kernels.SCHEMAS:
            continue
        run = wrap(pointer_kernels.schemas()[row.name][1], row.name)
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


def without(kernel):
    """Take out each constraint on a layout in turn: some case must be wrong, or fault, then."""
    op = kernel.partition("_")[2]
    key, row = (kernel, op), kernel_of(kernel, op)
    found = [each for each in row.contract.constraints if isinstance(each, LAYOUT_CONSTRAINTS)]
    for constraint in found:
        rest = tuple(each for each in row.contract.constraints if each is not constraint)
        contract_table._table[key] = (replace(row, contract=Contract(rest)),)
        try:
            wrong = eager(kernel)
        except (RuntimeError, IndexError) as error:
            wrong = str(error)
        print(f"{'found' if wrong else 'MISSED'} without {constraint}")
    contract_table._table[key] = (row,)
    return 0


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
    kernel, _, generation = kernel.partition(":")
    pointer_kernels.register(generation)
    if way in ("verify", "without"):
        return {"verify": verified, "without": without}[way](kernel)
    wrong = eager(kernel) if way == "eager" else 0
    libraries = LIBRARIES if kernel == "all" else ((kernel,),)
    for names in libraries if way != "eager" else ():
        ops = [name.partition("_")[2] for name in names]
        lower = "inductor" if "inductor" in way else "eager"
        training = way.startswith("train")
        # Symbolic shapes cost ten times as much: fewer cases show the same.
        quick = training or lower == "inductor" or sizes == "dynamic"
        wrong += compiled(names, ops, lower, sizes == "dynamic", quick, training)
    hits = counters["inductor"]["fxgraph_cache_hit"]
    print(f"{len(pointer_kernels.CALLS)} calls, {wrong} wrong, {hits} graphs from the cache")
    return int(bool(wrong or not pointer_kernels.CALLS))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

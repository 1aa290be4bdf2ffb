"""Sites that the contract table is asked about, and calls of kernels on tensors that lie so.

`good_site` is a site that a kernel takes, and `broken_sites` change one thing of it at a time. The
shapes of `call_sites` go together, so that a kernel can be called: `fault` says how its results
differ from those of the reference.
"""

import itertools
from dataclasses import replace

import torch

from fixpass.lowering.contract import Kernel
from fixpass.lowering.layout import Layout, dense_stride
from fixpass.lowering.site import OPERANDS, Site
from fixpass.runtime.ops import REFERENCES

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FP8 = torch.float8_e4m3fn
ROWS = ("x", "residual", "gate", "out", "q", "k", "cos", "sin")
EPS = 1e-6


def good_site(kernel: Kernel) -> Site:
    """A site that the contract takes: dense bf16 rows and a weight."""
    layouts = {name: Layout.contiguous((6, 128), BF16) for name in OPERANDS[kernel.op]}
    layouts |= {
        name: Layout.contiguous((128,), BF16)
        for name in layouts
        if name.endswith(("weight", "bias"))
    }
    if "scale" in layouts:
        layouts["scale"] = Layout.contiguous((1,), F32)
    needed = {"qk_norm_rope": {"rotary_dim": 128}, "gated_rms_norm": {"activation": "silu"}}
    every = [(needed.get(kernel.op, {}), BF16), ({"norm_dtype": BF16}, BF16), *quantised()]
    for steps, dtype in every:
        out = Layout.contiguous((6, 128), dtype)
        for left_out in ((), ("bias",), ("bias", "residual", "scale")):
            names = set(layouts) - set(left_out)
            site = Site(kernel.op, {**{n: layouts[n] for n in names}, "out": out}, "cuda", steps)
            if kernel.check(site):
                return site
    raise AssertionError(f"no site satisfies {kernel.name}")


def quantised():
    """Rounding steps with those of a quantisation, and the dtype of its codes."""
    for dtype, high, least in ((FP8, 448.0, 1 / (448 * 512)), (torch.int8, 127.0, 2**-23)):
        low = -high if dtype == FP8 else -128.0
        for apply in ("divide", "reciprocal"):
            steps = {"norm_dtype": BF16, "low": low, "high": high, "apply": apply}
            dynamic = {**steps, "limit": high, "scale_min": least}
            yield from ((each, dtype) for each in (steps, dynamic, {**dynamic, "group_size": 128}))


def broken_sites(site: Site):
    """The site with one thing changed at a time: shapes, strides, dtypes, steps, operands."""
    dtype = site.x.dtype
    changes = [
        Layout.contiguous((2, 3, 128), dtype),
        Layout.contiguous((2, 3, 4, 5, 6, 7, 128), dtype),
        Layout.contiguous((128,), dtype),
        Layout.contiguous((6, 70000), dtype),
        Layout.contiguous((6, 127), dtype),
        Layout.contiguous((0, 128), dtype),
        Layout((6, 128), (384, 1), dtype),
        Layout((6, 128), (129, 1), dtype),
        Layout((6, 128), (1, 6), dtype),
        Layout((6, 128), (128, 1), dtype, offset=1),
        Layout((6, 1, 128), (128, 999, 1), dtype),
        Layout((6, 128), (2**32, 1), dtype),
        Layout((2, 3, 2, 3, 2, 128), (4096, 1100, 512, 140, 130, 1), dtype),
        *(Layout.contiguous((6, 128), other) for other in (F32, F64, torch.float16)),
    ]
    for count in range(1, 4):
        for names in itertools.combinations([n for n in ROWS if n in site.layouts], count):
            for change in changes:
                yield site.with_layouts(**dict.fromkeys(names, change))
    if "x" in site.layouts:
        once = Layout((2**26, 128), (0, 1), dtype)
        everywhere = Layout.contiguous((2**26, 128), dtype)
        yield site.with_layouts(**{**dict.fromkeys(site.rows, once), "out": everywhere})
    for name in ("weight", "bias"):
        if name in site.layouts:
            yield site.with_layouts(**{name: Layout.contiguous((128,), F32)})
            yield site.with_layouts(**{name: Layout((128,), (2,), dtype)})
            rest = {n: v for n, v in site.layouts.items() if n != name}
            yield Site(site.op, rest, "cuda", site.steps)
        else:
            yield site.with_layouts(**{name: Layout.contiguous((128,), dtype)})
    for name, shape, other in (
        ("scale", (1,), dtype),
        ("scale", (128,), F32),
        ("residual", (3, 128), dtype),
        ("residual", (6, 128), F32),
    ):
        if name in OPERANDS[site.op]:
            yield site.with_layouts(**{name: Layout.contiguous(shape, other)})
            rest = {n: v for n, v in site.layouts.items() if n != name}
            yield Site(site.op, rest, "cuda", site.steps)
    if "out" in site.layouts and site.op == "rms_norm_quant":
        yield site.with_layouts(out=Layout.contiguous((6, 128), FP8))
        yield site.with_layouts(out=Layout.contiguous((6, 128), torch.int8))
    for steps in (
        {"compute_dtype": BF16},
        {"norm_dtype": BF16},
        {"norm_dtype": None},
        {"norm_dtype": F64},
        {"weight_offset": 0.5},
        {"group_size": 96},
        {"apply": "multiply"},
        {"rotary_dim": 127},
    ):
        yield Site(site.op, site.layouts, "cuda", {**site.steps, **steps})


def _row_sites(site: Site):
    """Rows of other shapes, with parameters that fit, and rows that lie otherwise."""
    rows, dtype = [name for name in ROWS if name in site.layouts], site.x.dtype
    hidden = (127, 124, 192)
    shapes = [
        (1, 40000),
        *((6, size) for size in hidden),
        (0, 128),
        (2, 3, 128),
        (128,),
        (2, 1, 2, 1, 3, 128),
    ]
    for shape in [*shapes, (1, 2, 1, 3, 1, 2, 128)]:
        found = {name: Layout.contiguous(shape, site.layouts[name].dtype) for name in rows}
        for name, layout in site.layouts.items():
            if name.endswith(("weight", "bias")):
                found[name] = Layout.contiguous(shape[-1:], layout.dtype)
        yield site.with_layouts(**found)
    for strided in (
        Layout((6, 128), (384, 1), dtype),
        Layout((6, 128), (129, 1), dtype),
        Layout((6, 128), (1, 6), dtype),
        Layout((6, 128), (256, 2), dtype),
        Layout((6, 128), (128, 1), dtype, offset=1),
        Layout((2, 3, 128), (128, 256, 1), dtype),
        Layout((6, 1, 128), (128, 1000, 1), dtype),
        Layout((1, 6, 128), (128, 128, 1), dtype),
        Layout((2, 3, 2, 3, 2, 128), (4096, 1100, 512, 140, 130, 1), dtype),
        Layout((2, 3, 2, 3, 2, 2, 128), (9000, 2900, 1400, 460, 300, 140, 1), dtype),
    ):
        dense = {n: Layout.contiguous(strided.shape, site.layouts[n].dtype) for n in rows}
        for name in rows:
            given = replace(strided, dtype=site.layouts[name].dtype)
            yield site.with_layouts(**dense | {name: given})
        inputs = dict.fromkeys((name for name in rows if name != "out"), strided)
        yield site.with_layouts(**dense | inputs)
    if "k" in site.layouts:
        narrow = Layout.contiguous((64,), dtype)
        yield site.with_layouts(k=Layout.contiguous((6, 64), dtype), k_weight=narrow)


def _dtype_sites(site: Site):
    """Operands of another dtype, each by itself and all together, the sum of squares in float32."""
    floats = [name for name, each in site.layouts.items() if name != "scale" and each.dtype == BF16]
    rows = [name for name in floats if name in ROWS and name != "out"]
    weights = [name for name in floats if name.endswith("weight")]
    groups = (floats, rows, weights, *([name] for name in floats))
    for dtype, names in itertools.product((torch.float16, F32, F64), groups):
        changed = {name: replace(site.layouts[name], dtype=dtype) for name in names}
        steps = {"compute_dtype": F32}
        if site.steps.get("norm_dtype") and "x" in names:
            steps["norm_dtype"] = dtype
        yield Site(site.op, {**site.layouts, **changed}, "cuda", {**site.steps, **steps})
    for dtype in (torch.int8, FP8) if site.op == "rms_norm_quant" else ():
        for steps, code in quantised():
            if code == dtype:
                layouts = {**site.layouts, "out": Layout.contiguous((6, 128), dtype)}
                yield Site(site.op, layouts, "cuda", steps)
    if site.op == "rms_norm_quant":
        yield site.with_layouts(out=Layout.contiguous((6, 128), torch.float8_e5m2))


def _operand_sites(site: Site):
    """Parameters that lie otherwise, and operands that are there or not."""
    dtype = site.x.dtype
    for name in ("weight", "bias"):
        if name not in site.layouts:
            continue
        for stride, offset in ((2, 0), (1, 1), (0, 0)):
            yield site.with_layouts(**{name: Layout((128,), (stride,), dtype, offset)})
    others = {"weight": (128,), "bias": (128,), "residual": (6, 128), "scale": (1,)}
    others["k_weight"] = (128,)
    for name in others:
        if name not in OPERANDS[site.op]:
            continue
        if name in site.layouts:
            rest = {n: v for n, v in site.layouts.items() if n != name}
            if name != "residual" or site.op != "add_rms_norm":
                yield Site(site.op, rest, "cuda", site.steps)
        else:
            made = Layout.contiguous(others[name], F32 if name == "scale" else dtype)
            yield site.with_layouts(**{name: made})
    if "scale" in OPERANDS[site.op]:
        for shape, scale in (((1,), dtype), ((128,), F32)):
            yield site.with_layouts(scale=Layout.contiguous(shape, scale))
    if "residual" in OPERANDS[site.op]:
        yield site.with_layouts(residual=Layout.contiguous((1, 128), dtype))
    if "gate" in OPERANDS[site.op]:
        yield site.with_layouts(gate=Layout.contiguous((1, 128), dtype))


STEPS = (
    {"compute_dtype": BF16},
    {"norm_dtype": BF16},
    {"norm_dtype": None},
    {"weight_offset": 0.5},
    {"weight_offset": 1.0, "weight_dtype": F32},
    {"group_size": 96},
    {"group_size": 64},
    {"apply": "multiply"},
)


def call_sites(site: Site):
    """The site with one thing changed, and what must change with it, so that it can be called."""
    yield site
    yield from _row_sites(site)
    yield from _dtype_sites(site)
    yield from _operand_sites(site)
    unknown = {"rms_norm_quant": set(), "gated_rms_norm": {"apply"}}
    for steps in STEPS:
        if not steps.keys() & unknown.get(site.op, {"group_size", "apply"}):
            yield Site(site.op, site.layouts, "cuda", {**site.steps, **steps})


def arguments(site: Site):
    """Tensors that lie as a site says, and the steps of the op that give its `out`; or None.

    None: no step gives such a result.
    """
    out, steps = site.layouts["out"], dict(site.steps)
    shapes = {layout.shape for name, layout in site.layouts.items() if name in ("x", "q", "out")}
    order = sorted(range(out.rank), key=lambda dim: -out.stride[dim])
    if len(shapes) > 1 or not out.has_stride(dense_stride(out.shape, order)) or out.offset:
        return None
    if site.op == "rms_norm_quant":
        steps["quant_dtype"] = out.dtype
        if not out.is_dense() or out.dtype.itemsize > 1:
            return None
    else:
        steps["out_dtype"] = out.dtype
        if not out.is_dense():
            steps["order"] = order
    torch.manual_seed(0)
    made = {name: _tensor(name, layout) for name, layout in site.layouts.items() if name != "out"}
    return [made.get(name) for name in OPERANDS[site.op]], steps


def _tensor(name, layout):
    spans = zip(layout.shape, layout.stride, strict=True)
    count = layout.offset + sum(max(size - 1, 0) * stride for size, stride in spans) + 1
    values = torch.rand(count) / 64 + 0.004 if name == "scale" else torch.randn(count) + 0.25
    return values.to(layout.dtype).as_strided(layout.shape, layout.stride, layout.offset)


def fault(site: Site, call):
    """How the results of a call differ from the reference; empty where they are right, or none.

    call: takes the op's tensors, eps and steps. An error that it raises is a fault, too.
    """
    found = arguments(site)
    if found is None:
        return ""
    tensors, steps = found
    try:
        want = REFERENCES[site.op](*tensors, EPS, **steps)
    except (RuntimeError, ValueError):
        return ""  # The op has no meaning there.
    try:
        got = call(*tensors, EPS, **steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True)
    return next(filter(None, itertools.starmap(_difference, pairs)), "")


def _difference(got, want):
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype} {tuple(got.shape)} for {want.dtype} {tuple(want.shape)}"
    if Layout.of(got).has_stride(want.stride()) is not True:
        return f"strides {got.stride()} for {want.stride()}"
    step = 0.13 if want.dtype in (FP8, torch.int8) else 0.02
    a, b = got.double(), want.double()
    if not torch.allclose(a, b, rtol=step, atol=50 * step if step > 0.1 else step):
        return f"off by {(a - b).abs().max():.3g}"
    # A stand-in computes in float64: what it rounds as the reference does differs at ties only.
    other = (~torch.isclose(a, b, rtol=1e-5, atol=1e-6)).double().mean().item() if a.numel() else 0
    return f"{other:.0%} of the elements are rounded otherwise" if other > 0.01 else ""

"""Device functions that turn a tile of float32 values into codes and scales, in registers.

The steps are those of `fixpass.runtime.quantized_norm.Quantization`. Nothing is loaded or stored.
"""

# A kernel's arguments have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import triton
import triton.language as tl

DIVIDE: tl.constexpr = tl.constexpr(0)
RECIPROCAL: tl.constexpr = tl.constexpr(1)


@triton.jit
def larger(a, b):
    """The larger of two numbers; NaN where one of them is, as in torch.amax."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def scale_of(
    amax,
    LIMIT: tl.constexpr,
    AMAX_MIN: tl.constexpr,
    SCALE_MIN: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The scales of groups with these largest magnitudes."""
    if AMAX_MIN > 0.0:
        amax = larger(amax, AMAX_MIN)
    scale = tl.math.div_rn(amax, tl.full(amax.shape, LIMIT, tl.float32)).to(SCALE).to(tl.float32)
    if SCALE_MIN > 0.0:
        scale = larger(scale, SCALE_MIN)
    return scale


@triton.jit
def apply_scale(y, scale, APPLY: tl.constexpr):
    """`y` scaled; `scale` has y's shape."""
    if APPLY == DIVIDE:
        return tl.math.div_rn(y, scale)
    if APPLY == RECIPROCAL:
        scale = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return y * scale


@triton.jit
def encode(y, LOW: tl.constexpr, HIGH: tl.constexpr, CODE: tl.constexpr, IS_NATIVE: tl.constexpr):
    """The bits of `y`, clamped and converted to the dtype CODE, as uint8; NaN stays NaN.

    IS_NATIVE: the device converts to CODE in hardware.
    """
    y = tl.where(y > HIGH, HIGH, tl.where(y < LOW, LOW, y))
    if tl.int8 == CODE:
        # Adding 1.5 * 2^23 rounds to an integer, half to even.
        return ((y + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True)
    if IS_NATIVE:
        return y.to(CODE).to(tl.uint8, bitcast=True)
    return encode_float8(y, tl.float8e4b8 == CODE)


@triton.jit
def encode_float8(y, IS_FNUZ: tl.constexpr):
    """The nearest e4m3fn or e4m3fnuz code, ties to even, by integer arithmetic, for any device.

    A normal number keeps 3 bits of mantissa. The step of the subnormal numbers is 2^-9 or, with
    the exponent bias of fnuz, 2^-10: adding the float32 whose last bit is that step rounds to it.
    """
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    if IS_FNUZ:
        small = (tl.abs(y) + 8192.0).to(tl.int32, bitcast=True) - 0x46000000
        code = tl.where(magnitude < 0x3C000000, small, rounded - 952)
        code = tl.where(code == 0, 0, code | sign)
        return tl.where(magnitude > 0x7F800000, 0x80, code).to(tl.uint8)
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, rounded - 960)
    return tl.where(magnitude > 0x7F800000, 0x7F, code | sign).to(tl.uint8)

"""Special functions that take one instruction each on NVIDIA. The interpreter and HIP run a portable equivalent.

Triton's own exp2 guards subnormal results and its division adds a correction. Together they would nearly double the
cost of an element of a focal loss. The PTX documentation bounds the errors over the full range, subnormals flushed:

    ex2.approx.ftz.f32    relative error 2^-22
    rcp.approx.ftz.f32    1 ulp, a relative error of 2^-23
    lg2.approx.ftz.f32    2^-22, absolute between 1/2 and 2, relative elsewhere

So lg2 serves for powers, but not for softplus: log(1 + e) of a background logit of -7 would be wrong by 1e-4.
"""

from retina_fast.kernels.dispatch import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2 to the power of x, float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x, float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / x


@triton.jit
def log2(x, PTX: tl.constexpr):
    """Logarithm to base 2, float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def widen(x, PTX: tl.constexpr):
    """x as float32. Two bfloat16 numbers are the halves of a word: one instruction each, where Triton takes three."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """p = sigmoid(x) and l = log(1 + exp(-|x|)), so that softplus(x) = max(x, 0) + l and log(p) = min(x, 0) - l.

    l = -log(1 - q) with q = min(p, 1 - p) is computed by the minimax polynomial of this function on [0, 1/2], which has
    a relative error of 1e-6. NaN gives NaN.
    """
    p = reciprocal(1 + exp2(x * -LOG2E, PTX), PTX)
    q = tl.minimum(p, 1 - p)
    h = 0.990582287311554 * q - 0.6379219889640808
    h = h * q + 0.5227454304695129
    h = h * q + 0.18753233551979065
    h = h * q + 0.3389110267162323
    h = h * q + 0.49981674551963806
    h = h * q + 1.0000009536743164
    return p, h * q


@triton.jit
def atan(x):
    """Arc tangent of x >= 0, float32, with a relative error of 2e-7.

    On [0, 1] it is the minimax polynomial of the arc tangent, above 1 it is pi/2 - atan(1/x).
    """
    t = tl.minimum(x, 1 / x)
    z = t * t
    h = 0.002849888987839222 * z - 0.016068626195192337
    h = h * z + 0.042691513895988464
    h = h * z - 0.07504294067621231
    h = h * z + 0.10640934109687805
    h = h * z - 0.14203643798828125
    h = h * z + 0.1999261975288391
    h = h * z - 0.3333307206630707
    h = h * z * t + t
    return tl.where(x > 1, 1.5707963267948966 - h, h)

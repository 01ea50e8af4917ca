"""A pointwise (1x1) conv with what follows it, as one product of matrices: y = activation(x W + b + z).

    x (B*H*W, C_in), W (C_in, C_out), y and z (B*H*W, C_out): channels_last tensors, read as matrices of pixels

A residual block ends so. A conv that is followed by a pass for bias, sum and activation writes y, reads it with z and
writes it again; this kernel reads x and z and writes y, once each. Where the shortcut of the block is a pointwise conv
itself, its product goes into the same float32 sum, and z, which it would be, does not exist:

    y = activation(x W + x2 W2 + b)

A z of another height and width is read as ``F.interpolate(z, size, mode="nearest")`` would copy it, which is what a
feature pyramid adds (Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.conv_epilogue import ACTIVATIONS, conv_epilogue_reference
from retina_fast.kernels.dispatch import INTERPRETED, is_differentiated, runs_triton, tl, triton

_WIDEN = INTERPRETED  # then the product is float32's: the interpreter's reads bfloat16 as integers
_HALVES = (torch.bfloat16, torch.float16)
Shortcut = tuple[Tensor, Tensor, int]  # input, weight and stride of a second conv


def conv_pointwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str,
    stride: int = 1,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """The definition, differentiable; see :func:`conv_pointwise`."""
    y = F.conv2d(at_least_float32(x), at_least_float32(weight), stride=stride)
    if shortcut is not None:
        x2, weight2, stride2 = shortcut
        y = y + F.conv2d(at_least_float32(x2), at_least_float32(weight2), stride=stride2)
    if z is not None and z.shape != y.shape:
        z = F.interpolate(z, y.shape[2:], mode="nearest")
    return conv_epilogue_reference(y, bias, z, activation).to(x.dtype)


@triton.jit
def _source(pixel, high, wide, z_high, z_wide, high_scale, wide_scale):
    """The pixel of z that nearest interpolation copies to each of y's, numbered over the batch."""
    row = pixel // wide
    image, i = row // high, row % high
    i = tl.minimum((i.to(tl.float32) * high_scale).to(tl.int32), z_high - 1)
    j = tl.minimum(((pixel % wide).to(tl.float32) * wide_scale).to(tl.int32), z_wide - 1)
    return (image * z_high + i) * z_wide + j


@triton.jit
def _strided(pixel, high, wide, x_high, x_wide, STRIDE: tl.constexpr):
    """The pixel of x that a conv with a stride reads for each of y's, numbered over the batch."""
    if STRIDE == 1:
        return pixel
    row = pixel // wide
    return (row // high * x_high + row % high * STRIDE) * x_wide + pixel % wide * STRIDE


@triton.jit
def _add_product(
    acc, x_ptr, w_ptr, pixel, inside, n, in_layer, K: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr
):
    """acc plus the rows `pixel` of x (., K) times the rows n of w (N, K)."""
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + pixel.to(tl.int64)[:, None] * K + k[None, :]
    w_row = w_ptr + n[:, None] * K + k[None, :]
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_row + start, mask=inside[:, None], other=0.0)
            w = tl.load(w_row + start, mask=in_layer[:, None], other=0.0)
        else:
            x = tl.load(x_row + start, mask=inside[:, None] & (start + k < K)[None, :], other=0.0)
            w = tl.load(w_row + start, mask=in_layer[:, None] & (start + k < K)[None, :], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["pixels", "high", "wide", "x_high", "x_wide", "x2_high", "x2_wide", "z_high", "z_wide"])
def _conv_pointwise_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, z_ptr, x2_ptr, w2_ptr, pixels, high, wide, x_high, x_wide, x2_high, x2_wide,
    z_high, z_wide, z_high_scale, z_wide_scale, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    STRIDE: tl.constexpr, STRIDE2: tl.constexpr, RESIZED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M pixels by BLOCK_N channels. Those of the same pixels are neighbours."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pixel = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, in_layer = pixel < pixels, n < N
    out = pixel.to(tl.int64)[:, None] * N + n[None, :]
    written = inside[:, None] & in_layer[None, :]
    if z_ptr is not None:  # before the product, so that it comes meanwhile
        if RESIZED:
            source = _source(pixel, high, wide, z_high, z_wide, z_high_scale, z_wide_scale)
            z = tl.load(z_ptr + source.to(tl.int64)[:, None] * N + n[None, :], mask=written)
        else:
            z = tl.load(z_ptr + out, mask=written)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_pixel = _strided(pixel, high, wide, x_high, x_wide, STRIDE)
    acc = _add_product(acc, x_ptr, w_ptr, x_pixel, inside, n, in_layer, K, BLOCK_K, WIDEN)
    if x2_ptr is not None:
        x_pixel = _strided(pixel, high, wide, x2_high, x2_wide, STRIDE2)
        acc = _add_product(acc, x2_ptr, w2_ptr, x_pixel, inside, n, in_layer, K2, BLOCK_K, WIDEN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=in_layer).to(tl.float32)[None, :]
    if z_ptr is not None:
        acc += z.to(tl.float32)
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    elif ACTIVATION == "swish":
        acc = acc / (1 + tl.exp(-acc))
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=written)


def _tile(pixels: int, channels: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages."""
    return 128, 128, 64, 8, 3


@torch.library.custom_op("retina_fast::conv_pointwise", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str,
    stride: int,
    x2: Tensor | None,
    weight2: Tensor | None,
    stride2: int,
) -> Tensor:
    """See :func:`conv_pointwise`; everything in channels_last memory."""
    y = _fake(x, weight, bias, z, activation, stride, x2, weight2, stride2)
    _launch(y, x, weight, bias, z, activation, stride, x2, weight2, stride2, _tile(y.numel() // y.shape[1], y.shape[1]))
    return y


def _launch(y, x, weight, bias, z, activation, stride, x2, weight2, stride2, tile) -> None:
    (_, channels, high, wide), (block_m, block_n, block_k, warps, stages) = y.shape, tile
    pixels = y.shape[0] * high * wide
    z_sides = (high, wide) if z is None else tuple(z.shape[2:])
    x2_sides = (1, 1) if x2 is None else tuple(x2.shape[2:])
    grid = (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n),)
    with torch.cuda.device_of(x):
        _conv_pointwise_kernel[grid](
            y, x, weight, bias, z, x2, weight2, pixels, high, wide, *x.shape[2:], *x2_sides, *z_sides,
            z_sides[0] / high, z_sides[1] / wide, N=channels, K=x.shape[1], K2=0 if x2 is None else x2.shape[1],
            STRIDE=stride, STRIDE2=stride2, RESIZED=z_sides != (high, wide), ACTIVATION=activation, BLOCK_M=block_m,
            BLOCK_N=block_n, BLOCK_K=block_k, WIDEN=_WIDEN, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip


@_op.register_fake
def _fake(x, weight, bias, z, activation, stride, x2, weight2, stride2):
    sides = ((side - 1) // stride + 1 for side in x.shape[2:])
    return torch.empty(
        (x.shape[0], weight.shape[0], *sides), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def serves_pointwise(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel runs a conv of such a weight: on a GPU, in half precision and in channels_last memory."""
    halves = all(t is None or t.dtype == x.dtype for t in (weight, *others)) and x.dtype in _HALVES
    served = halves and runs_triton(x, weight, *others) and not is_differentiated(x, weight, *others)
    return served and weight.shape[2:] == (1, 1) and x.is_contiguous(memory_format=torch.channels_last)


def conv_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    activation: str = "none",
    stride: int = 1,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """A 1x1 conv, a bias, the sum with another tensor and an activation: ``activation(conv(x) + bias + z)``.

    Sums are float32 and rounded once. Where :func:`serves_pointwise` says no, the reference runs.

    Args:
        x: ``(B, C_in, H, W)`` of a floating-point dtype.
        weight: ``(C_out, C_in, 1, 1)``.
        bias: ``(C_out,)``, or None.
        z: ``(B, C_out, H_z, W_z)``, or None. Where its height and width are not the output's, it is resized by nearest
            neighbours, as by ``F.interpolate``.
        activation: "none", "relu" or "swish".
        stride: of the conv, the same for height and width.
        shortcut: input ``(B, C_2, H_2, W_2)``, weight ``(C_out, C_2, 1, 1)`` and stride of a second conv, whose output
            is added, too; or None.

    Returns:
        ``(B, C_out, H_out, W_out)`` of x's dtype, in channels_last memory.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, with the argument's name.

    Example::

        >>> x, weight = torch.tensor([[1.0, -2.0]]).view(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
        >>> z = torch.full((1, 1, 1, 1), 0.5)
        >>> [float(conv_pointwise(x, weight, None, z, activation)) for activation in ("none", "relu")]
        [-0.5, 0.0]
    """
    _check(x, weight, bias, z, activation, stride, shortcut)
    x2, weight2, stride2 = shortcut or (None, None, 1)
    if not (serves_pointwise(x, weight, bias, z, x2, weight2) and x.numel() and weight.numel()):
        y = conv_pointwise_reference(x, weight, bias, z, activation, stride, shortcut)
        return y.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    z, x2, weight2 = (
        None if tensor is None else tensor.contiguous(memory_format=torch.channels_last) for tensor in (z, x2, weight2)
    )
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _op(x, weight, bias, z, activation, stride, x2, weight2, stride2)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str,
    stride: int,
    shortcut: Shortcut | None,
) -> None:
    """Raises ValueError, with the name, for arguments that the kernel would misread."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C_in, H, W), got {tuple(x.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    batch, sides = x.shape[0], ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    channels = weight.shape[0] if weight.dim() else 0
    check_shape("weight", weight, "(C_out, C_in, 1, 1)", (channels, x.shape[1], 1, 1))
    others = {"weight": weight, "bias": bias, "z": z}
    if bias is not None:
        check_shape("bias", bias, "(C_out,)", (channels,))
    if z is not None and (z.dim() != 4 or z.shape[:2] != (batch, channels) or 0 in z.shape[2:]):
        raise ValueError(f"z must be ({batch}, {channels}, H_z, W_z), got {tuple(z.shape)}")
    if shortcut is not None:
        x2, weight2, stride2 = shortcut
        found = tuple(x2.shape[:1]), *((side - 1) // stride2 + 1 for side in x2.shape[2:])
        if stride2 < 1 or x2.dim() != 4 or found != ((batch,), *sides):
            raise ValueError(
                f"the shortcut's output must be of {sides} pixels, got x {tuple(x2.shape)}, stride {stride2}"
            )
        check_shape("the shortcut's weight", weight2, "(C_out, C_2, 1, 1)", (channels, x2.shape[1], 1, 1))
        others |= {"the shortcut's x": x2, "the shortcut's weight": weight2}
    check_devices(x.device, **others)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")

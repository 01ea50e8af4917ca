"""A pointwise (1x1) conv with what follows it, as one product of matrices: y = activation(x W + b + z).

    x (B*H*W, C_in), W (C_in, C_out), y and z (B*H*W, C_out): channels_last tensors, read as matrices of pixels

A residual block ends so. A conv that is followed by a pass for bias, sum and activation writes y, reads it with z and
writes it again; this kernel reads x and z and writes y, once each. Where the shortcut of the block is a pointwise conv
itself, its product goes into the same float32 sum, and z, which it would be, does not exist:

    y = activation(x W + x2 W2 + b)

A z of another height and width is read as ``F.interpolate(z, size, mode="nearest")`` would copy it, which is what a
feature pyramid adds (Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 3).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.conv_epilogue import ACTIVATIONS, conv_epilogue_reference
from retina_fast.kernels.dispatch import INTERPRETED, TensorDescriptor, is_differentiated, runs_triton, tl, triton

_WIDEN = INTERPRETED  # then the product is float32's: the interpreter's reads bfloat16 as integers
_DESCRIBES = True  # copies whole blocks by descriptors (TMA); the emulator knows none
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
    if STRIDE != 1:
        row = pixel // wide
        pixel = (row // high * x_high + row % high * STRIDE) * x_wide + pixel % wide * STRIDE
    return pixel


@triton.jit
def _block(matrix, first, rows, kept, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """COLUMNS columns from `start` on of a matrix WIDTH wide, 0 beyond its end: by a descriptor, of as many rows from
    `first` on as its blocks have; by address, of those rows that are kept."""
    if DESCRIBED:
        block = matrix.load([first, start])
    else:
        column, kept = start + tl.arange(0, COLUMNS), kept[:, None]
        if WIDTH % COLUMNS:
            kept = kept & (column < WIDTH)[None, :]
        block = tl.load(matrix + rows.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=kept, other=0.0)
    return block


@triton.jit
def _add_product(
    acc, x, w, first, x_rows, inside, first_channel, channels, in_layer, K: tl.constexpr, BLOCK_K: tl.constexpr,
    X_DESCRIBED: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc plus rows of x (., K) times rows of w (N, K)."""
    for start in range(0, K, BLOCK_K):
        a = _block(x, first, x_rows, inside, start, K, BLOCK_K, X_DESCRIBED)
        b = _block(w, first_channel, channels, in_layer, start, K, BLOCK_K, DESCRIBED)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["pixels", "high", "wide", "x_high", "x_wide", "x2_high", "x2_wide", "z_high", "z_wide"])
def _conv_pointwise_kernel(
    y, x, w, bias_ptr, z, x2, w2, pixels, high, wide, x_high, x_wide, x2_high, x2_wide, z_high, z_wide, z_high_scale,
    z_wide_scale, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, STRIDE: tl.constexpr, STRIDE2: tl.constexpr,
    RESIZED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M pixels by BLOCK_N channels. Those of the same pixels are neighbours."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first, first_channel = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    pixel, channels = first + tl.arange(0, BLOCK_M), first_channel + tl.arange(0, BLOCK_N)
    inside, in_layer = pixel < pixels, channels < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = _strided(pixel, high, wide, x_high, x_wide, STRIDE)
    acc = _add_product(
        acc, x, w, first, rows, inside, first_channel, channels, in_layer, K, BLOCK_K, DESCRIBED and STRIDE == 1,
        DESCRIBED, WIDEN,
    )  # fmt: skip
    if x2 is not None:
        rows = _strided(pixel, high, wide, x2_high, x2_wide, STRIDE2)
        acc = _add_product(
            acc, x2, w2, first, rows, inside, first_channel, channels, in_layer, K2, BLOCK_K,
            DESCRIBED and STRIDE2 == 1, DESCRIBED, WIDEN,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channels, mask=in_layer).to(tl.float32)[None, :]
    if z is not None:
        rows = pixel
        if RESIZED:
            rows = _source(pixel, high, wide, z_high, z_wide, z_high_scale, z_wide_scale)
        acc += _block(z, first, rows, inside, first_channel, N, BLOCK_N, DESCRIBED and not RESIZED).to(tl.float32)
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    elif ACTIVATION == "swish":
        acc = acc / (1 + tl.exp(-acc))
    if DESCRIBED:
        y.store([first, first_channel], acc.to(y.dtype))
    else:
        address = y + pixel.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(address, acc.to(y.dtype.element_ty), mask=inside[:, None] & in_layer[None, :])


def _tile(pixels: int, channels: int, channels_in: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages.

    Short products are bound by memory, and many small programs keep more bytes on their way. Of few pixels large
    programs would leave most of a GPU idle.
    """
    few = triton.cdiv(pixels, 128) * triton.cdiv(channels, 128) < 64
    return (64, 128, 64, 4, 3) if few or channels_in <= 256 else (128, 128, 64, 8, 3)


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
    (batch, channels, high, wide), channels_in = y.shape, (x.shape[1], 0 if x2 is None else x2.shape[1])
    block_m, block_n, block_k, warps, stages = _tile(batch * high * wide, channels, sum(channels_in))
    z_sides, x2_sides = ((high, wide) if t is None else tuple(t.shape[2:]) for t in (z, x2))
    resized = z_sides != (high, wide)
    described = _DESCRIBES and all(map(may_be_described, (y, x, weight, z, x2, weight2)))

    def block(tensor: Tensor | None, rows: int, columns: int, with_descriptor: bool = True) -> Any:
        """The tensor as a matrix of pixels, with a descriptor of its blocks where one is asked for."""
        if tensor is None or not (described and with_descriptor):
            return tensor
        return TensorDescriptor.from_tensor(tensor.permute(0, 2, 3, 1).flatten(0, 2), [rows, columns])

    grid = (triton.cdiv(batch * high * wide, block_m) * triton.cdiv(channels, block_n),)
    with torch.cuda.device_of(x):
        _conv_pointwise_kernel[grid](
            block(y, block_m, block_n), block(x, block_m, block_k, stride == 1), block(weight, block_n, block_k), bias,
            block(z, block_m, block_n, not resized), block(x2, block_m, block_k, stride2 == 1),
            block(weight2, block_n, block_k), batch * high * wide, high, wide, *x.shape[2:], *x2_sides, *z_sides,
            z_sides[0] / high, z_sides[1] / wide, N=channels, K=channels_in[0], K2=channels_in[1], STRIDE=stride,
            STRIDE2=stride2, RESIZED=resized, ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            DESCRIBED=described, WIDEN=_WIDEN, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def may_be_described(tensor: Tensor | None) -> bool:
    """Whether rows of channels start on a boundary of 16 bytes, which the GPU's copies of whole blocks ask for."""
    return tensor is None or (tensor.shape[1] % 8 == 0 and tensor.data_ptr() % 16 == 0)


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
        bias: ``(C_out,)``, of any floating-point dtype, or None.
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
    served = serves_pointwise(x, weight, z, x2, weight2) and runs_triton(bias) and not is_differentiated(bias)
    if not (served and x.numel() and weight.numel()):
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
        if tensor is not None and tensor.dtype != x.dtype and name != "bias":
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")

"""Convs in a row as one kernel: the end of a bottleneck (He et al. 2015, https://arxiv.org/abs/1512.03385, figure 5)
and the first conv of the next block.

    x = relu(conv(x0, W0) + b0)       3x3 with padding 1, where x0 is given in place of x
    y = relu(x W + b + z)             x (M, K), W (K, N), z and y (M, N): channels_last tensors, as matrices of pixels
    y' = relu(y W' + b')              W' (N, N'), y' (M, N')

y is the wide tensor, four times as wide as x and y'. Two kernels write it and read it again; here a program keeps its
pixels of x, goes through y in blocks of channels, writes each, and multiplies it by its rows of W' while it is there.
So of the M (K + 3 N + N') numbers that two kernels move, M N are not read. With the 3x3 conv in the same kernel x is
not written and read either, nor is there a pass for its bias. Where the shortcut of the block is a pointwise conv, its
product x2 W2 goes into the sum in z's place.

x and y are rounded to their dtype before the next product, as where that product reads them from memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.conv_pointwise import conv_pointwise_reference, may_be_described, serves_pointwise
from retina_fast.kernels.dispatch import INTERPRETED, TensorDescriptor, is_differentiated, runs_triton, tl, triton

_WIDEN = INTERPRETED  # then products are computed in float32: the interpreter would read bfloat16 as integers
_DESCRIBES = True  # copies whole blocks by descriptors (TMA); the emulator knows none
_WIDE, _NEXT, _NARROW, _FILTERED = 1024, 256, 128, 64  # most channels of y, of y', of x, and with the 3x3 conv
_FEW = 2**16  # pixels; with fewer, large tiles would leave a part of a GPU idle
Shortcut = tuple[Tensor, Tensor]  # input and weight of a second conv
Before = tuple[Tensor, Tensor]  # weight and bias of a 3x3 conv


def conv_chain_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    z: Tensor | None = None,
    shortcut: Shortcut | None = None,
    before: Before | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable; see :func:`conv_chain`."""
    if before is not None:
        weight0, bias0 = at_least_float32(before[0]), before[1]
        x = F.conv2d(at_least_float32(x), weight0, bias0.to(weight0.dtype), padding=1).relu().to(x.dtype)
    y = conv_pointwise_reference(x, weight, bias, z, "relu", 1, None if shortcut is None else (*shortcut, 1))
    return y, conv_pointwise_reference(y, next_weight, next_bias, None, "relu")


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    """acc plus a (M, K) times rows b (N, K)."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, acc, input_precision="ieee")


@triton.jit
def _rows(
    matrix, first, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr
):
    """ROWS rows of COLUMNS of a matrix of weights, WIDTH wide."""
    if DESCRIBED:
        block = matrix.load([first, start])
    else:
        row, column = first + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
        block = tl.load(matrix + row[:, None] * WIDTH + column[None, :])
    return block


@triton.jit
def _pixels(
    tensor, image, line, column, channel, high, wide, C: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    CHANNELS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A tile's pixels (BH BW, CHANNELS), 0 outside of the image."""
    if DESCRIBED:
        block = tensor.load([image, line, column, channel]).reshape(BH * BW, CHANNELS)
    else:
        m = tl.arange(0, BH * BW)
        i, j = line + m // BW, column + m % BW
        inside = (i >= 0) & (i < high) & (j >= 0) & (j < wide)
        offset = ((image * high + i) * wide + j).to(tl.int64)[:, None] * C + (channel + tl.arange(0, CHANNELS))[None, :]
        block = tl.load(tensor + offset, mask=inside[:, None], other=0.0)
    return block


@triton.jit
def _put(
    tensor, block, image, line, column, channel, high, wide, C: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    CHANNELS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Writes a tile's pixels (BH BW, CHANNELS)."""
    if DESCRIBED:
        tensor.store([image, line, column, channel], block.to(tensor.dtype).reshape(1, BH, BW, CHANNELS))
    else:
        m = tl.arange(0, BH * BW)
        i, j = line + m // BW, column + m % BW
        offset = ((image * high + i) * wide + j).to(tl.int64)[:, None] * C + (channel + tl.arange(0, CHANNELS))[None, :]
        tl.store(tensor + offset, block.to(tensor.dtype.element_ty), mask=((i < high) & (j < wide))[:, None])


@triton.jit(do_not_specialize=["high", "wide"])
def _conv_chain_kernel(
    y, next_y, x, w0, bias0_ptr, w, bias_ptr, z, x2, w2, next_w, next_bias_ptr, high, wide, N: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K2: tl.constexpr, NEXT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program computes BH by BW pixels of y and of next_y, BLOCK_N channels of y at a time."""
    down, across = tl.cdiv(high, BH), tl.cdiv(wide, BW)
    image, line = tl.program_id(0) // (down * across), tl.program_id(0) // across % down * BH
    column = tl.program_id(0) % across * BW
    if w0 is None:
        a = _pixels(x, image, line, column, 0, high, wide, K, BH, BW, K, DESCRIBED)
    else:
        acc = tl.zeros((BH * BW, K), tl.float32)
        for tap in tl.range(0, 9, num_stages=STAGES):
            i, j = line + tap // 3 - 1, column + tap % 3 - 1
            a = _pixels(x, image, i, j, 0, high, wide, K0, BH, BW, K0, DESCRIBED)
            acc = _product(a, _rows(w0, 0, tap * K0, 9 * K0, K, K0, DESCRIBED), acc, WIDEN)
        acc += tl.load(bias0_ptr + tl.arange(0, K)).to(tl.float32)[None, :]
        a = tl.where(acc < 0, 0.0, acc).to(y.dtype if DESCRIBED else y.dtype.element_ty)
    if x2 is not None:
        a2 = _pixels(x2, image, line, column, 0, high, wide, K2, BH, BW, K2, DESCRIBED)
    following = tl.zeros((BH * BW, NEXT), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        total = tl.zeros((BH * BW, BLOCK_N), tl.float32)
        total = _product(a, _rows(w, start, 0, K, BLOCK_N, K, DESCRIBED), total, WIDEN)
        if x2 is not None:
            total = _product(a2, _rows(w2, start, 0, K2, BLOCK_N, K2, DESCRIBED), total, WIDEN)
        total += tl.load(bias_ptr + start + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
        if z is not None:
            added = _pixels(z, image, line, column, start, high, wide, N, BH, BW, BLOCK_N, DESCRIBED)
            total += added.to(tl.float32)
        block = tl.where(total < 0, 0.0, total).to(y.dtype if DESCRIBED else y.dtype.element_ty)
        _put(y, block, image, line, column, start, high, wide, N, BH, BW, BLOCK_N, DESCRIBED)
        following = _product(block, _rows(next_w, 0, start, N, NEXT, BLOCK_N, DESCRIBED), following, WIDEN)
    following += tl.load(next_bias_ptr + tl.arange(0, NEXT)).to(tl.float32)[None, :]
    following = tl.where(following < 0, 0.0, following)
    _put(next_y, following, image, line, column, 0, high, wide, NEXT, BH, BW, NEXT, DESCRIBED)


def _tile(pixels: int, channels_next: int, filtered: bool) -> tuple[int, int, int, int, int]:
    """Rows and columns of pixels, BLOCK_N, warps and stages."""
    few = pixels < _FEW
    if filtered and few:
        return 8, 8, 64 if channels_next <= 64 else 32, 4, 3
    if filtered:
        return (8, 16, 64, 4, 3) if channels_next <= 64 else (8, 16, 32, 4, 4)
    if few:
        return 1, 64, 64, 4, 2
    return (1, 128, 32, 8, 3) if channels_next <= 128 else (1, 64, 32, 4, 3)


@torch.library.custom_op("retina_fast::conv_chain", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    z: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    weight0: Tensor | None,
    bias0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`conv_chain`; everything in channels_last memory."""
    y, next_y = _fake(x, weight, bias, next_weight, next_bias, z, x2, weight2, weight0, bias0)
    (batch, _, high, wide), (channels, narrow) = x.shape, weight.shape[:2]
    second, following = 0 if x2 is None else x2.shape[1], next_weight.shape[0]
    rows, columns, block_n, warps, stages = _tile(batch * high * wide, following, weight0 is not None)
    block_n = min(block_n, channels)
    if weight0 is None:  # pixels are all alike, and a tile is a run of them
        batch, high, wide = 1, 1, batch * high * wide
    tensors = y, next_y, x, weight, z, x2, weight2, next_weight, weight0
    described = _DESCRIBES and all(map(may_be_described, tensors))

    def tile(tensor: Tensor | None, channels: int) -> Any:
        """The tensor, with a descriptor of its tiles of pixels."""
        if tensor is None or not described:
            return tensor
        pixels = tensor.permute(0, 2, 3, 1).view(batch, high, wide, -1)
        return TensorDescriptor.from_tensor(pixels, [1, rows, columns, channels])

    def block(weight: Tensor | None, rows: int, columns: int) -> Any:
        """A weight as a matrix, with a descriptor of its blocks."""
        if weight is None or not described:
            return weight
        return TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 1).flatten(1), [rows, columns])

    with torch.cuda.device_of(x):
        _conv_chain_kernel[(batch * triton.cdiv(high, rows) * triton.cdiv(wide, columns),)](
            tile(y, block_n), tile(next_y, following), tile(x, x.shape[1]), block(weight0, narrow, x.shape[1]), bias0,
            block(weight, block_n, narrow), bias, tile(z, block_n), tile(x2, second), block(weight2, block_n, second),
            block(next_weight, following, block_n), next_bias, high, wide, N=channels, K=narrow, K0=x.shape[1],
            K2=second, NEXT=following, BH=rows, BW=columns, BLOCK_N=block_n, DESCRIBED=described, WIDEN=_WIDEN,
            STAGES=stages, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y, next_y


@_op.register_fake
def _fake(x, weight, bias, next_weight, next_bias, z, x2, weight2, weight0, bias0):
    return tuple(
        torch.empty(
            (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        for channels in (weight.shape[0], next_weight.shape[0])
    )


def _has_room(device: torch.device) -> bool:
    """Whether a program may have as much shared memory as the tiles take: of NVIDIA's, on H100 and B200. True of a fake
    GPU."""
    if torch.version.hip is not None or device.type != "cuda" or not torch.cuda.is_available():
        return torch.version.hip is None and device.type == "cuda"
    return (9, 0) <= torch.cuda.get_device_capability(device) < (11, 0)


def _is_power(size: int, most: int) -> bool:
    return 16 <= size <= most and size & (size - 1) == 0


def serves_chain(
    x: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    z: Tensor | None = None,
    shortcut: Shortcut | None = None,
    before: Before | None = None,
) -> bool:
    """Whether the kernel runs on these: on an NVIDIA GPU of compute capability 9 or 10, in half precision and in
    channels_last memory, numbers of channels being powers of two: up to 64 of a 3x3 conv, else 128 before, 1024
    between, and 256 after the two convs."""
    x2, weight2 = shortcut or (None, None)
    weight0, _ = before or (None, None)
    fits = _is_power(weight.shape[0], _WIDE) and _is_power(next_weight.shape[0], _NEXT)
    fits = fits and all(w is None or _is_power(w.shape[1], _NARROW) for w in (weight, weight2))
    fits = fits and (weight0 is None or all(_is_power(size, _FILTERED) for size in weight0.shape[:2]))
    fits = fits and _has_room(x.device)
    one = weight if weight0 is None else weight0.new_empty(0, x.shape[1], 1, 1)
    served = fits and next_weight.shape[2:] == (1, 1) and serves_pointwise(x, one, weight, next_weight, z, x2, weight2)
    return served and weight.shape[2:] == (1, 1)


def conv_chain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    z: Tensor | None = None,
    shortcut: Shortcut | None = None,
    before: Before | None = None,
) -> tuple[Tensor, Tensor]:
    """Two 1x1 convs in a row with what follows each, ``y = relu(conv(x) + bias + z)`` and
    ``relu(conv(y) + next_bias)``, and a 3x3 conv before them or none.

    Sums are float32, and each tensor is rounded once. Where :func:`serves_chain` says no, the reference runs.

    Args:
        x: ``(B, C_in, H, W)`` of a floating-point dtype.
        weight: ``(C_out, C_mid, 1, 1)``.
        bias: ``(C_out,)``, of any floating-point dtype, as the other biases are.
        next_weight: ``(C_next, C_out, 1, 1)``.
        next_bias: ``(C_next,)``.
        z: ``(B, C_out, H, W)``, or None.
        shortcut: input ``(B, C_2, H, W)`` and weight ``(C_out, C_2, 1, 1)`` of a conv, whose output is added, too; or
            None.
        before: weight ``(C_mid, C_in, 3, 3)`` and bias ``(C_mid,)`` of a conv with padding 1 and ReLU that x goes
            through first; or None, then C_mid is C_in.

    Returns:
        ``(B, C_out, H, W)`` and ``(B, C_next, H, W)`` of x's dtype, in channels_last memory.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, with the argument's name.

    Example::

        >>> x, double = torch.tensor([3.0]).view(1, 1, 1, 1), torch.tensor([2.0]).view(1, 1, 1, 1)
        >>> y, following = conv_chain(x, double, torch.tensor([1.0]), -double, torch.tensor([20.0]))
        >>> float(y), float(following)
        (7.0, 6.0)
    """
    _check(x, weight, bias, next_weight, next_bias, z, shortcut, before)
    x2, weight2 = shortcut or (None, None)
    weight0, bias0 = before or (None, None)
    served = serves_chain(x, weight, next_weight, z, shortcut, before)
    served = served and runs_triton(bias, next_bias, weight0, bias0)
    if not (served and x.numel()) or is_differentiated(bias, next_bias, weight0, bias0):
        pair = conv_chain_reference(x, weight, bias, next_weight, next_bias, z, shortcut, before)
        y, following = (tensor.contiguous(memory_format=torch.channels_last) for tensor in pair)
        return y, following
    weight, next_weight = (t.contiguous(memory_format=torch.channels_last) for t in (weight, next_weight))
    z, x2, weight2, weight0 = (
        None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)
        for tensor in (z, x2, weight2, weight0)
    )
    bias0 = None if bias0 is None else bias0.contiguous()
    given = x, weight, bias.contiguous(), next_weight, next_bias.contiguous()
    return _op(*given, z, x2, weight2, weight0, bias0)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    z: Tensor | None,
    shortcut: Shortcut | None,
    before: Before | None,
) -> None:
    """Raises ValueError, with the name, for arguments that the kernel would misread."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C_in, H, W), got {tuple(x.shape)}")
    channels, following = (t.shape[0] if t.dim() else 0 for t in (weight, next_weight))
    narrow = x.shape[1]
    alike: dict[str, Tensor | None] = {"weight": weight, "next_weight": next_weight, "z": z}
    biases = {"bias": bias, "next_bias": next_bias}
    if before is not None:
        weight0, bias0 = before
        narrow = weight0.shape[0] if weight0.dim() else 0
        check_shape("the weight before", weight0, "(C_mid, C_in, 3, 3)", (narrow, x.shape[1], 3, 3))
        check_shape("the bias before", bias0, "(C_mid,)", (narrow,))
        alike, biases = alike | {"the weight before": weight0}, biases | {"the bias before": bias0}
    check_shape("weight", weight, "(C_out, C_mid, 1, 1)", (channels, narrow, 1, 1))
    check_shape("next_weight", next_weight, "(C_next, C_out, 1, 1)", (following, channels, 1, 1))
    check_shape("bias", bias, "(C_out,)", (channels,))
    check_shape("next_bias", next_bias, "(C_next,)", (following,))
    if z is not None:
        check_shape("z", z, "(B, C_out, H, W)", (x.shape[0], channels, *x.shape[2:]))
    if shortcut is not None:
        x2, weight2 = shortcut
        second = x2.shape[1] if x2.dim() == 4 else 0
        check_shape("the shortcut's x", x2, "(B, C_2, H, W)", (x.shape[0], second, *x.shape[2:]))
        check_shape("the shortcut's weight", weight2, "(C_out, C_2, 1, 1)", (channels, second, 1, 1))
        alike |= {"the shortcut's x": x2, "the shortcut's weight": weight2}
    for name, tensor in alike.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
    check_devices(x.device, **biases, **alike)

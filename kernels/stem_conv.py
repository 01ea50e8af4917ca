"""The first conv of a ResNet: 7x7, stride 2, padding 3, of three channels (He et al. 2015,
https://arxiv.org/abs/1512.03385, table 1), in half precision.

    y[b, n, i, j] = sum over c, r, s of x[b, c, 2i + r - 3, 2j + s - 3] w[n, c, r, s]

cuDNN's kernels take channels in eights: they copy the image with five channels of zeros, and multiply the zeros. In
channels_last memory the 7 pixels under a row of the filter are 21 numbers that lie next to each other. So y is a
product of matrices, of each pixel's window of 7 times 21 numbers and the weights: 147 terms where cuDNN has 392. A row
of a window begins at an odd number. With the number before it, it is 11 aligned pairs, which the hardware copies into
shared memory while the tiles before are multiplied. Of the product's 160 terms 154 are used. The number before a window
is multiplied by 0: where it is infinite or NaN, that window gives NaN, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import check_devices, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton

_TILE = 64  # pixels
_WIDTH = 16  # of a tile
_WARPS = 4
_STAGES = 3  # tiles of windows in shared memory; all but one are being read ahead
_PROGRAMS = 264  # two on each multiprocessor of an H200


def stem_conv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, differentiable by autograd; see :func:`stem_conv`."""
    return F.conv2d(x, weight, stride=2, padding=3)


@triton.jit
def _weights(weight_ptr, k, n, channels, stride_n, stride_c, stride_r, stride_s):
    """The rows k of the matrix of weights (K, N): zero for the number before a window, and beyond the last."""
    r, e = k // 22, k % 22 - 1
    s, c = e // 3, e % 3
    offset = n[None, :] * stride_n + (c * stride_c + r * stride_r + s * stride_s)[:, None]
    return tl.load(weight_ptr + offset, mask=((k < 154) & (e >= 0))[:, None] & (n < channels)[None, :], other=0.0)


@triton.jit
def _windows(x_ptr, row, first, k, height, row_size, M: tl.constexpr, W: tl.constexpr):
    """The numbers k of the windows of a tile's pixels (M, K), zero outside of the image. The window of the first pixel
    begins at number ``first`` of ``row``; the image has ``height`` rows of ``row_size`` numbers."""
    r, e = k // 22, k % 22
    m = tl.arange(0, M)
    i, j = (row + 2 * (m // W))[:, None] + r[None, :], (first + 6 * (m % W))[:, None] + e[None, :]
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < row_size) & (k < 154)[None, :]
    offset = (row * row_size + first + 2 * (m // W) * row_size + 6 * (m % W))[:, None] + (r * row_size + e)[None, :]
    return tl.load(x_ptr + offset, mask=inside, other=0.0)


@triton.jit
def _stem_conv_kernel(
    x_ptr, weight_ptr, y_ptr, height, row_size, out_height, out_width, batch, channels, stride_n, stride_c, stride_r,
    stride_s, M: tl.constexpr, W: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program computes every so many-th tile of M pixels, M / W rows of W, with all channels; it loads the weights
    once."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    left, right = tl.arange(0, 128), 128 + tl.arange(0, 32)
    left_weights = _weights(weight_ptr, left, n, channels, stride_n, stride_c, stride_r, stride_s)
    right_weights = _weights(weight_ptr, right, n, channels, stride_n, stride_c, stride_r, stride_s)
    high, wide = tl.cdiv(out_height, M // W), tl.cdiv(out_width, W)
    for tile in tl.range(tl.program_id(0), batch * high * wide, tl.num_programs(0), num_stages=STAGES):
        image = (tile // (high * wide)).to(tl.int64)
        line, column = tile // wide % high * (M // W), tile % wide * W
        row, first = 2 * line - 3, 6 * column - 10
        pixels = x_ptr + image * height * row_size
        y = tl.dot(_windows(pixels, row, first, left, height, row_size, M, W), left_weights)
        y = tl.dot(_windows(pixels, row, first, right, height, row_size, M, W), right_weights, y)
        line, column = line + m // W, column + m % W
        offset = (line * out_width + column)[:, None] * channels + n[None, :]
        inside = ((line < out_height) & (column < out_width))[:, None] & (n < channels)[None, :]
        out = y_ptr + image * out_height * out_width * channels
        tl.store(out + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("retina_fast::stem_conv", mutates_args=())
def _op(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`stem_conv`; x in channels_last memory, as y is."""
    y = _empty(x, weight)
    batch, channels, height, width = y.shape
    tiles = batch * triton.cdiv(height, _TILE // _WIDTH) * triton.cdiv(width, _WIDTH)
    with torch.cuda.device_of(x):
        _stem_conv_kernel[(min(tiles, _PROGRAMS),)](
            x, weight, y, x.shape[2], 3 * x.shape[3], height, width, batch, channels, *weight.stride(), M=_TILE,
            W=_WIDTH, N=max(16, triton.next_power_of_2(channels)), STAGES=_STAGES, num_warps=_WARPS,
        )  # fmt: skip
    return y


@_op.register_fake
def _(x, weight):
    return _empty(x, weight)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    sizes = x.shape[0], weight.shape[0], *((side - 1) // 2 + 1 for side in x.shape[2:])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def serves_stem(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel runs on these: on an NVIDIA GPU from compute capability 8.0, in half precision, x
    channels_last, no gradient asked for."""
    suits = x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous(memory_format=torch.channels_last)
    fits = tuple(weight.shape[1:]) == (3, 7, 7) and 0 < weight.shape[0] <= 128 and weight.dtype == x.dtype
    served = suits and fits and runs_triton(x, weight) and not is_differentiated(x, weight)
    return served and _copies_asynchronously(x.device)


def _copies_asynchronously(device: torch.device) -> bool:
    """Whether the GPU copies into shared memory without waiting, as the kernel has it; true of a fake one."""
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def stem_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The conv of 7x7 with stride 2 and padding 3 by which a ResNet begins, without a bias.

    Args:
        x: ``(B, 3, H, W)``. The kernel takes bfloat16 and float16 in channels_last memory on an NVIDIA GPU from compute
            capability 8.0, and is fast where W is a multiple of 16; PyTorch's conv runs for anything else, or where a
            gradient may be asked for.
        weight: ``(C_out, 3, 7, 7)``, of x's dtype; the kernel takes up to 128 channels.

    Returns:
        ``(B, C_out, ceil(H / 2), ceil(W / 2))``.

    Raises:
        ValueError: if x or weight has another shape, or they differ in dtype or device.

    Example::

        >>> tuple(stem_conv(torch.rand(2, 3, 64, 96), torch.rand(8, 3, 7, 7)).shape)
        (2, 8, 32, 48)
    """
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ValueError(f"x must be (B, 3, H, W) with at least one pixel, got {tuple(x.shape)}")
    check_shape("weight", weight, "(C_out, 3, 7, 7)", (weight.shape[0] if weight.dim() else 0, 3, 7, 7))
    check_devices(x.device, weight=weight)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    return _op(x, weight) if serves_stem(x, weight) and len(x) else stem_conv_reference(x, weight)

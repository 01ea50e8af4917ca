"""Max pooling of a ResNet's stem with the bias and the ReLU before it (He et al. 2015, https://arxiv.org/abs/1512.03385,
table 1): windows of 3x3, stride 2, padding 1.

    y = max(maxpool(x) + b, 0)  =  maxpool(max(x + b, 0))

Adding a constant, rounding and ReLU never change an order, so the pooled sum is the sum pooled, to the last bit, and
the bias is added to a quarter of the elements. A NaN makes a NaN of every window that holds it, as in PyTorch.

On a GPU PyTorch reads and writes x once for the bias and once more for the ReLU, and its pooling writes eight bytes of
index beside each element of y. Here x is read once and y written once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton

_TILE = 1024  # elements of a program's row: 8 a thread, 16 bytes in bf16
_ROWS = 2  # of y, that a program writes; the row of x between them is read once
_WARPS = 4


def max_pool_relu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, differentiable by autograd; see :func:`max_pool_relu`."""
    before = at_least_float32(x)
    if bias is not None:
        before = before + at_least_float32(bias)[:, None, None]
    return F.max_pool2d(before.relu().to(x.dtype), 3, 2, 1)


def pooled_size(size: int) -> int:
    """The rows or columns of y for those of x."""
    return (size - 1) // 2 + 1


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_maximum(x_ptr, row, height, width, column, inside, C: tl.constexpr):
    """The maxima (P, C) of three neighbours in a row of x, -inf outside of it."""
    x_ptr += row * width * C
    inside = inside & (row >= 0) & (row < height)
    best = tl.load(x_ptr, mask=inside, other=-float("inf")).to(tl.float32)
    before = tl.load(x_ptr - C, mask=inside & (column > 0), other=-float("inf")).to(tl.float32)
    after = tl.load(x_ptr + C, mask=inside & (column + 1 < width), other=-float("inf")).to(tl.float32)
    return _larger(_larger(before, best), after)


@triton.jit
def _max_pool_relu_kernel(
    x_ptr, bias_ptr, y_ptr, height, width, out_height, out_width, C: tl.constexpr, CHANNELS: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, b) writes P pixels of ROWS rows of image b, in a block of CHANNELS channels."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    image = tl.program_id(2).to(tl.int64)
    x_ptr += image * height * width * C
    y_ptr += image * out_height * out_width * C
    pixel = (tl.program_id(0) // blocks) * P + tl.arange(0, P)[:, None]
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < out_width) & (channel < C)
    column = 2 * pixel
    x_ptr += column * C + channel
    first = tl.program_id(1) * ROWS
    best = _row_maximum(x_ptr, 2 * first - 1, height, width, column, inside, C)
    for r in tl.static_range(ROWS):
        row = first + r
        middle = _row_maximum(x_ptr, 2 * row, height, width, column, inside, C)
        below = _row_maximum(x_ptr, 2 * row + 1, height, width, column, inside, C)
        y = _larger(_larger(best, middle), below)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        y = tl.where(y < 0, 0.0, y).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (row * out_width + pixel) * C + channel, y, mask=inside & (row < out_height))
        best = below


@torch.library.custom_op("retina_fast::max_pool_relu", mutates_args=())
def _op(x: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`max_pool_relu`; x in channels_last memory, as y is, and bias contiguous."""
    y = _empty(x)
    batch, channels, height, width = y.shape
    block = min(64, triton.next_power_of_2(channels))
    pixels = _TILE // block
    grid = triton.cdiv(width, pixels) * triton.cdiv(channels, block), triton.cdiv(height, _ROWS), batch
    with torch.cuda.device_of(x):
        _max_pool_relu_kernel[grid](
            x, bias, y, *x.shape[2:], height, width, C=channels, CHANNELS=block, P=pixels, ROWS=_ROWS, num_warps=_WARPS
        )
    return y


@_op.register_fake
def _(x, bias):
    return _empty(x)


def _empty(x: Tensor) -> Tensor:
    sizes = *x.shape[:2], *(pooled_size(side) for side in x.shape[2:])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def serves_max_pool(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel runs on these: on a GPU, in channels_last memory, no gradient asked for."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return last and runs_triton(x, bias) and not is_differentiated(x, bias)


def max_pool_relu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """ReLU of x and a bias, then max pooling over windows of 3x3 with stride 2 and padding 1.

    Args:
        x: ``(B, C, H, W)`` of a floating-point dtype. The kernel takes channels_last memory on a GPU; PyTorch's pooling
            runs for another layout or device, or where a gradient may be asked for.
        bias: ``(C,)``, or None.

    Returns:
        ``(B, C, ceil(H / 2), ceil(W / 2))``.

    Raises:
        ValueError: if x has no pixel, or bias does not fit or lies on another device.

    Example::

        >>> x = torch.tensor([[-5.0, 1.0], [2.0, -3.0]]).view(1, 1, 2, 2)
        >>> max_pool_relu(x, torch.tensor([0.5])).item()
        2.5
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, C, H, W) with at least one pixel and channel, got {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, "(C,)", (x.shape[1],))
    check_devices(x.device, bias=bias)
    if not (serves_max_pool(x, bias) and len(x)):
        return max_pool_relu_reference(x, bias)
    return _op(x, None if bias is None else bias.contiguous())

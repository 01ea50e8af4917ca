"""The first channels of a conv's output, with a bias: y[:, c] = x[:, c] + bias[c] for c < C of C' channels.

In half precision a conv runs on tensor cores where its channels are a multiple of 8. For other numbers, such as the
819 = 9 * 91 logits of a detector's cell, cuDNN pads the weights, writes the padded channels to a workspace, and copies
the first of them to where they belong, in a pass at a fraction of the memory's speed; the bias is another pass. With
weights that are padded beforehand, one pass does both: it reads C' and writes C numbers a pixel. The gradient needs
padding, too, once for the conv's input and once for its weights; here one pass pads it and sums it by channel:

    dx[:, c] = dy[:, c] for c < C, 0 for the others        dbias[c] = sum of dy[:, c] over images and pixels
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices
from retina_fast.kernels.dispatch import is_transformed, runs_triton, tl, triton

ALIGNMENT = 8  # channels: 16 bytes in half precision

_BLOCK = 4096  # numbers of a tile; the fastest of those that were tried
_GRADIENT_BLOCK, _GRADIENT_WARPS = 8192, 8
_PROGRAMS = 1056  # that sum by channel: 8 for each multiprocessor of an H200


def first_channels_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The definition; see :func:`first_channels`."""
    y = at_least_float32(x[:, : len(bias)]) + at_least_float32(bias)[:, None, None]
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@triton.jit
def _first_channels_kernel(
    x_ptr, bias_ptr, y_ptr, rows, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program t writes ROWS pixels of y (rows, C), from x (rows, WIDTH)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = row < rows - first
    # The channels up to WIDTH are loaded, too, so that a load may be of 16 bytes.
    x = tl.load(x_ptr + first * WIDTH + row * WIDTH + c, mask=inside & (c < WIDTH)).to(tl.float32)
    y = x + tl.load(bias_ptr + c, mask=c < C).to(tl.float32)
    tl.store(y_ptr + first * C + row * C + c, y.to(y_ptr.dtype.element_ty), mask=inside & (c < C))


@triton.jit
def _padded_gradient_kernel(
    dy_ptr, dx_ptr, sums_ptr, rows, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program t of T writes every T-th tile of ROWS pixels of dx (rows, WIDTH), and its sums by channel of (T, C)."""
    row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(0).to(tl.int64) * ROWS
    sums = tl.zeros([COLUMNS], tl.float32)
    while first < rows:
        inside = row < rows - first
        dy = tl.load(dy_ptr + first * C + row * C + c, mask=inside & (c < C), other=0.0)
        tl.store(dx_ptr + first * WIDTH + row * WIDTH + c, dy, mask=inside & (c < WIDTH))
        sums += tl.sum(dy.to(tl.float32), axis=0)
        first += tl.num_programs(0).to(tl.int64) * ROWS
    c = tl.arange(0, COLUMNS)
    tl.store(sums_ptr + tl.program_id(0) * C + c, sums, mask=c < C)


def _empty(like: Tensor, channels: int) -> Tensor:
    """Channels_last memory for another number of channels."""
    shape = like.shape[0], channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _tiles(width: int, block: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"COLUMNS": columns, "ROWS": max(1, block // columns)}


@torch.library.custom_op("retina_fast::first_channels", mutates_args=())
def _op(x: Tensor, bias: Tensor) -> Tensor:
    """See :func:`first_channels`; x in channels_last memory, bias contiguous."""
    y, width = _empty(x, len(bias)), x.shape[1]
    rows, tiles = y.numel() // len(bias), _tiles(width, _BLOCK)
    with torch.cuda.device_of(x):
        _first_channels_kernel[(triton.cdiv(rows, tiles["ROWS"]),)](
            x, bias, y, rows, C=len(bias), WIDTH=width, **tiles, enable_fp_fusion=False
        )
    return y


@torch.library.custom_op("retina_fast::first_channels_backward", mutates_args=())
def _backward_op(dy: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """dx with so many channels, and dbias in float32; dy in channels_last memory."""
    dx, channels = _empty(dy, width), dy.shape[1]
    rows, tiles = dy.numel() // channels, _tiles(width, _GRADIENT_BLOCK)
    programs = min(_PROGRAMS, triton.cdiv(rows, tiles["ROWS"]))
    sums = dy.new_empty(programs, channels, dtype=torch.float32)
    with torch.cuda.device_of(dy):
        _padded_gradient_kernel[(programs,)](
            dy, dx, sums, rows, C=channels, WIDTH=width, **tiles, num_warps=_GRADIENT_WARPS, enable_fp_fusion=False
        )
    return dx, sums.sum(dim=0)


@_op.register_fake
def _(x, bias):
    return _empty(x, len(bias))


@_backward_op.register_fake
def _(dy, width):
    return _empty(dy, width), dy.new_empty(dy.shape[1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, bias = inputs
    ctx.width, ctx.bias_dtype = x.shape[1], bias.dtype


def _backward(ctx, dy):
    dx, dbias = _backward_op(dy.contiguous(memory_format=torch.channels_last), ctx.width)
    return dx, dbias.to(ctx.bias_dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


def suits_padding(weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    """Whether a conv's channels are to be padded by :func:`padded_weight`: on a GPU, in half precision, where they are
    no multiple of 8 and a bias follows."""
    half, odd = weight.dtype in (torch.float16, torch.bfloat16), len(weight) % ALIGNMENT > 0
    return half and odd and bias is not None and groups == 1 and runs_triton(weight, bias)


def padded_weight(weight: Tensor) -> Tensor:
    """The weight (C, ...) of a conv with zeros for more output channels, up to a multiple of 8; differentiable.

    Example::

        >>> padded_weight(torch.ones(36, 8, 3, 3)).shape
        torch.Size([40, 8, 3, 3])
    """
    missing = -len(weight) % ALIGNMENT
    padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
    return padded.contiguous(memory_format=torch.channels_last)


def first_channels(x: Tensor, bias: Tensor) -> Tensor:
    """The first C channels of x plus a bias, ``(B, C, H, W)`` in channels_last memory and x's dtype; differentiable.

    Args:
        x: ``(B, C', H, W)``, of a floating-point dtype, what a conv with :func:`padded_weight` gives.
        bias: ``(C,)``, added in float32 at least; C is at most C'.

    Raises:
        ValueError: if x or bias has another shape, or they lie on different devices.

    Example::

        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
        >>> first_channels(x, torch.tensor([0.0, 10.0])).flatten()
        tensor([ 1., 12.])
    """
    if x.dim() != 4 or bias.dim() != 1 or len(bias) > x.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"x must be (B, C', H, W) and bias (C,), C at most C', got {shapes}")
    check_devices(x.device, bias=bias)
    if not runs_triton(x, bias) or is_transformed(x, bias) or not x.numel() or not len(bias):
        return first_channels_reference(x, bias)
    return _op(x.contiguous(memory_format=torch.channels_last), bias.contiguous())

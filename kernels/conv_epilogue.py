"""What follows a conv in one pass over its output: y = activation(y + bias + z), in place.

    relu   max(y, 0), where a NaN stays one
    swish  y * sigmoid(y)

PyTorch adds a conv's bias on a GPU by a pass of its own, a residual sum and an activation by one more each: seven reads
and writes of the output's size. Here they are three, computed in float32 and rounded once.

The gradients of bias, sum and ReLU take one pass more: dz = dy where y > 0, else 0, and its sums by channel. Each
program adds up the rows that it reads, and a second launch the programs' sums, always in the same order.
"""

import math

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton

ACTIVATIONS = ("none", "relu", "swish")

_BLOCK = 2048  # elements of a program: 16 a thread
_ROWS, _CHANNELS = 16, 256  # of a tile of the gradients' kernel, whose rows are pixels
_TILES, _PROGRAMS = 16, 528  # a program takes up to _TILES tiles in turn, while _PROGRAMS programs are left
_ADDED, _SUMMED = 64, 16  # rows and channels of a tile of the programs' sums
_ALIGNED = 8  # elements of 2 bytes that one load takes


def conv_epilogue_reference(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """The definition, not in place and differentiable; see :func:`conv_epilogue_`."""
    out = at_least_float32(y)
    if bias is not None:
        out = out + at_least_float32(bias)[:, None, None]
    if z is not None:
        out = out + at_least_float32(z)
    if activation == "relu":
        out = out.relu()
    elif activation == "swish":
        out = out * out.sigmoid()
    return out.to(y.dtype)


@triton.jit
def _conv_epilogue_kernel(y_ptr, bias_ptr, z_ptr, size, C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Program t handles BLOCK elements of y, whose channels lie next to each other."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < size - start
    channel = ((start % C).to(tl.int32) + i) % C
    y = tl.load(y_ptr + start + i, mask=inside).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel).to(tl.float32)
    if z_ptr is not None:
        y += tl.load(z_ptr + start + i, mask=inside).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "swish":
        y = y / (1 + tl.exp(-y))
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("retina_fast::conv_epilogue_", mutates_args=("y",))
def _op(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> None:
    """See :func:`conv_epilogue_`; y and z in channels_last memory, bias contiguous."""
    with torch.cuda.device_of(y):
        _conv_epilogue_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
            y, bias, z, y.numel(), C=y.shape[1], ACTIVATION=activation, BLOCK=_BLOCK, enable_fp_fusion=True
        )


@_op.register_fake
def _(y, bias, z, activation):
    return None


def serves_epilogue(y: Tensor) -> bool:
    """Whether the kernel runs on a conv's output: on a GPU, in channels_last memory."""
    return runs_triton(y) and y.is_contiguous(memory_format=torch.channels_last)


def conv_epilogue_(y: Tensor, bias: Tensor | None, z: Tensor | None, activation: str) -> Tensor:
    """Add a bias and another tensor to a conv's output and apply an activation, in place.

    Args:
        y: ``(B, C, H, W)`` of a floating-point dtype, in channels_last memory; it is overwritten. Where a gradient may
            be asked for, the reference runs.
        bias: ``(C,)``, or None.
        z: of y's shape, or None.
        activation: "none", "relu" or "swish".

    Returns:
        y.

    Raises:
        ValueError: if y is not in channels_last memory, bias or z does not fit or lies on another device, or activation
            is none of these.

    Example::

        >>> y = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
        >>> conv_epilogue_(y, torch.tensor([1.0, 1.0]), None, "relu").flatten()
        tensor([2., 0.])
    """
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"y must be (B, C, H, W) in channels_last memory, got {tuple(y.shape)}, strides {y.stride()}")
    if bias is not None:
        check_shape("bias", bias, "(C,)", (y.shape[1],))
    if z is not None:
        check_shape("z", z, "(B, C, H, W)", tuple(y.shape))
    check_devices(y.device, bias=bias, z=z)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if bias is None and z is None and activation == "none":
        return y
    if not runs_triton(y, bias, z) or is_differentiated(y, bias, z):
        return y.copy_(conv_epilogue_reference(y, bias, z, activation))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        z = None if z is None else z.contiguous(memory_format=torch.channels_last)
        _op(y, bias, z, activation)
    return y


@triton.jit
def _epilogue_gradients_kernel(
    dy_ptr, y_ptr, dz_ptr, sums_ptr, rows, tiles, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (p, c) handles `tiles` tiles of ROWS pixels by CHANNELS channels, one below the other; sums (P, C)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (channel < C)[None, :]
        place = row[:, None] * C + channel[None, :]
        dz = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
            dz = tl.where(y <= 0, 0.0, dz)
            tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        total += dz
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) * C + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit
def _add_sums_kernel(sums_ptr, out_ptr, rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Program c adds up the rows of CHANNELS columns of sums (rows, C)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < C)[None, :]
        total += tl.load(sums_ptr + row[:, None] * C + channel[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + channel, tl.sum(total, axis=0), mask=channel < C)


@torch.library.custom_op("retina_fast::epilogue_gradients", mutates_args=())
def _gradients_op(dy: Tensor, y: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    """dz, which is empty without y, and dbias, which is empty if nobody asks for it; dy, y in channels_last memory."""
    channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
    # Rows of a number of channels that is odd start anywhere: eight of them as one row start at multiples of 16 bytes.
    merged = _ALIGNED // math.gcd(channels, _ALIGNED)
    merged = merged if rows % merged == 0 else 1
    wide, high = channels * merged, rows // merged
    columns, tiles = triton.cdiv(wide, _CHANNELS), triton.cdiv(high, _ROWS)
    tiles = max(1, min(_TILES, tiles * columns // _PROGRAMS))
    programs = triton.cdiv(high, _ROWS * tiles)
    dz = torch.empty_like(dy) if y is not None else dy.new_empty(0)
    dbias = dy.new_empty(channels if with_bias else 0, dtype=torch.float32)
    sums = dy.new_empty((programs, wide), dtype=torch.float32) if with_bias else None
    with torch.cuda.device_of(dy):
        _epilogue_gradients_kernel[(programs, columns)](
            dy, y, dz if y is not None else None, sums, high, tiles, C=wide, ROWS=_ROWS, CHANNELS=_CHANNELS
        )
        if with_bias:
            _add_sums_kernel[(triton.cdiv(channels, _SUMMED),)](
                sums, dbias, programs * merged, C=channels, ROWS=_ADDED, CHANNELS=_SUMMED
            )
    return dz, dbias


@_gradients_op.register_fake
def _(dy, y, with_bias):
    dbias = dy.new_empty(dy.shape[1] if with_bias else 0, dtype=torch.float32)
    return torch.empty_like(dy) if y is not None else dy.new_empty(0), dbias


def epilogue_gradients_reference(dy: Tensor, y: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The definition; see :func:`epilogue_gradients`."""
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    return dz, dz.sum((0, 2, 3), dtype=at_least_float32(dz).dtype) if with_bias else None


def epilogue_gradients(dy: Tensor, y: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``relu(conv + bias + z)`` with respect to conv and z, and to the bias.

    Args:
        dy: ``(B, C, H, W)``, with respect to the output.
        y: the output, of dy's shape, or None where no ReLU follows.
        with_bias: whether that of the bias is asked for.

    Returns:
        dz as dy, which is dy itself without a ReLU, and dbias ``(C,)`` in float32 (float64 of float64), or None.

    Example::

        >>> y = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> [gradient.flatten().tolist() for gradient in epilogue_gradients(torch.ones(1, 2, 1, 1), y, True)]
        [[1.0, 0.0], [1.0, 0.0]]
    """
    if y is None and not with_bias:
        return dy, None
    if not dy.numel() or not runs_triton(dy, y) or is_differentiated(dy, y):
        return epilogue_gradients_reference(dy, y, with_bias)
    dy = dy.contiguous(memory_format=torch.channels_last)
    y = None if y is None else y.contiguous(memory_format=torch.channels_last)
    dz, dbias = _gradients_op(dy, y, with_bias)
    return dy if y is None else dz, dbias if with_bias else None

"""What follows a conv in one pass over its output: y = activation(y + bias + z), in place.

    relu   max(y, 0), where a NaN stays one
    swish  y * sigmoid(y)

PyTorch adds a conv's bias on a GPU by a pass of its own, a residual sum and an activation by one more each: seven reads
and writes of the output's size. Here they are three, computed in float32 and rounded once.

The gradients of bias, sum and ReLU take one pass more: dz = dy where y > 0, else 0, and its sums by channel. Each
program adds up the rows that it reads, and a second launch the programs' sums, always in the same order.
"""

import torch
from torch import Tensor

from retina_fast.kernels.arguments import at_least_float32, check_devices, check_shape
from retina_fast.kernels.dispatch import is_differentiated, runs_triton, tl, triton

ACTIVATIONS = ("none", "relu", "swish")

_BLOCK = 2048  # elements of a program: 16 a thread
_ROWS, _CHANNELS = 16, 256  # of a tile of the gradients' kernel, whose rows are pixels
_TILES, _PROGRAMS = 16, 528  # a program takes up to _TILES tiles in turn, while _PROGRAMS programs are left


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
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0)
        y = tl.load(y_ptr + place, mask=inside, other=0.0)
        dz = tl.where(y.to(tl.float32) <= 0, 0.0, dy.to(tl.float32))
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        total += dz
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) * C + channel, tl.sum(total, axis=0), mask=channel < C)


@torch.library.custom_op("retina_fast::epilogue_gradients", mutates_args=())
def _gradients_op(dy: Tensor, y: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """dz, and the programs' sums (P, C), where P is 0 without them; dy and y in channels_last memory."""
    rows, channels = y.shape[0] * y.shape[2] * y.shape[3], y.shape[1]
    tiles, programs, columns = _split(rows, channels)
    dz, sums = torch.empty_like(dy), dy.new_empty((programs * with_sums, channels), dtype=torch.float32)
    with torch.cuda.device_of(y):
        _epilogue_gradients_kernel[(programs, columns)](
            dy, y, dz, sums if with_sums else None, rows, tiles, C=channels, ROWS=_ROWS, CHANNELS=_CHANNELS
        )
    return dz, sums


def _split(rows: int, channels: int) -> tuple[int, int, int]:
    """How many tiles a program of the gradients' kernel takes, and how many programs there are along pixels and
    channels."""
    columns, tiles = -(-channels // _CHANNELS), -(-rows // _ROWS)
    tiles = max(1, min(_TILES, tiles * columns // _PROGRAMS))
    return tiles, -(-rows // (_ROWS * tiles)), columns


@_gradients_op.register_fake
def _(dy, y, with_sums):
    programs = _split(y.shape[0] * y.shape[2] * y.shape[3], y.shape[1])[1]
    return torch.empty_like(dy), dy.new_empty((programs * with_sums, y.shape[1]), dtype=torch.float32)


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
    if y is None or not dy.numel() or not (runs_triton(dy, y) and serves_epilogue(y)) or is_differentiated(dy, y):
        return epilogue_gradients_reference(dy, y, with_bias)
    dz, sums = _gradients_op(dy.contiguous(memory_format=torch.channels_last), y, with_bias)
    return dz, sums.sum(0) if with_bias else None

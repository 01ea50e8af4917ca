"""Image batching: images of differing sizes become one normalised, resized, padded batch (torchvision's transform).

    out[b, c, y, x] = bilinear((image_b[c] - mean[c]) / std[c]) inside image b's resized area, 0 in the padding

Bilinear without antialiasing, half-pixel centres, scale = input size / output size. uint8 images are divided by 255
first. On a GPU the batch is channels_last, as the convs of the trunk want it; on a CPU it is NCHW, so that they round
as torchvision's do.

torchvision launches about eight kernels an image (subtract, divide, resize, copy, and the constants' uploads) and makes
five passes over it, in the model's dtype. Here one launch serves the batch. Each image is read in place, whatever its
strides, through its address in a table on the device, and each element of the batch, padding included, is written once.
An output element is interpolated first and then normalised. The weights sum to 1, so that this gives the same result.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.dispatch import HAS_TRITON, is_differentiated, is_transformed, runs_triton, tl, triton

Sizes = Sequence[tuple[int, int]]


def batch_shape(images: Sequence[Tensor], sizes: Sizes, constants: int, size_divisible: int) -> tuple[int, ...]:
    """The shape (B, C, H, W) of a batch; C is ``constants`` or the images' channels, whichever is more.

    Raises:
        ValueError: if the images lie on different devices: their addresses go into one table.
    """
    for i, image in enumerate(images):
        if image.device != images[0].device:
            raise ValueError(f"images[{i}] must be on {images[0].device} as images[0] is, got {image.device}")
    height, width = (math.ceil(max(side) / size_divisible) * size_divisible for side in zip(*sizes, strict=True))
    return len(images), max(constants, *(len(image) for image in images)), height, width


def image_batch_reference(
    images: Sequence[Tensor], sizes: Sizes, mean: Sequence[float], std: Sequence[float], out: Tensor
) -> Tensor:
    """The definition; see :func:`image_batch`. Fills ``out`` and returns it."""
    for b, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        whole_numbers, place = not image.is_floating_point(), out[b, : max(map(len, (image, mean, std))), :h, :w]
        dtype = torch.float32 if whole_numbers else image.dtype
        centre, spread = (torch.as_tensor(x, dtype=dtype, device=image.device)[:, None, None] for x in (mean, std))
        if whole_numbers and image.shape[1:] == (h, w) and place.dtype == dtype and place.stride(2) == 1:
            place.copy_(image).div_(255).sub_(centre).div_(spread)  # half as long as a copy of what is made elsewhere
        else:
            if whole_numbers:
                image = image.float().div_(255)
            in_place = whole_numbers and len(image) == len(place)  # in what was just made
            image = image.expand(len(place), -1, -1)
            image = (image.sub_(centre) if in_place else image - centre).div_(spread)
            if image.shape[1:] != (h, w):
                image = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False)[0]
            place.copy_(image)
        out[b, :, :h, w:] = 0
        out[b, :, h:] = 0
    return out


# Triton. A row of the batch is W*C elements, the channel running fastest; a program writes a piece of several rows and
# finds columns and their weights once for all of them. Rows of an enlarged image lie between the same two rows of the
# source as the row before, or share one with it: what was read and interpolated along x is kept for the next row.

_BLOCK = 256  # of a row's 2400 to 4032 elements: few a thread, so that a warp's requests touch few lines of the cache
_ROWS = 8
_DTYPES = {torch.uint8: "uint8", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@triton.jit
def _scale(size_in, size_out):
    return tl.div_rn(size_in.to(tl.float32), size_out.to(tl.float32))


@triton.jit
def _source(position, scale, size_in):
    """The two pixels between which an output pixel lies, and its distance from the first. The position is rounded once,
    by an fma, as in torch's own resize: near 64 two roundings would already move it by 1e-5."""
    at = tl.maximum(tl.fma(scale, position + 0.5, -0.5), 0.0)
    first = tl.minimum(at.to(tl.int32), size_in - 1)
    return first, tl.minimum(first + 1, size_in - 1), at - first


@triton.jit
def _along_x(row_ptr, left, right, along, inside):
    """A row of the image, interpolated along x only."""
    a = tl.load(row_ptr + left, mask=inside, other=0).to(tl.float32)
    b = tl.load(row_ptr + right, mask=inside, other=0).to(tl.float32)
    return (1 - along) * a + along * b


@triton.jit
def _image_batch_kernel(
    table_ptr, out_ptr, factors, terms, height, row, DTYPE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, b) writes piece i of the j-th group of ROWS rows of image b, with the factor and the term of each
    channel: out = bilinear(image) * factor + term."""
    image = tl.program_id(2)
    table_ptr += image * 8
    pixels = tl.load(table_ptr).to(tl.pointer_type(getattr(tl, DTYPE)))
    h, w = tl.load(table_ptr + 1).to(tl.int32), tl.load(table_ptr + 2).to(tl.int32)
    out_h, out_w = tl.load(table_ptr + 3).to(tl.int32), tl.load(table_ptr + 4).to(tl.int32)
    stride_c, stride_h, stride_w = tl.load(table_ptr + 5), tl.load(table_ptr + 6), tl.load(table_ptr + 7)

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i // C
    c = i - x * C
    left, right, along = _source(x, _scale(w, out_w), w)
    left, right = c * stride_c + left * stride_w, c * stride_c + right * stride_w
    factor, term = factors[0], terms[0]
    for channel in tl.static_range(1, C):
        factor = tl.where(c == channel, factors[channel], factor)
        term = tl.where(c == channel, terms[channel], term)

    inside = x < out_w
    scale = _scale(h, out_h)
    y = tl.program_id(1) * ROWS
    end = tl.minimum(y + ROWS, height)
    out_ptr += (image * height + y).to(tl.int64) * row
    above, below = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    kept_upper, kept_lower = -1, -1  # the rows that these are
    while y < tl.minimum(end, out_h):
        upper, lower, down = _source(y, scale, h)
        if upper != kept_upper:
            above = below if upper == kept_lower else _along_x(pixels + upper * stride_h, left, right, along, inside)
        if lower != kept_lower:
            below = _along_x(pixels + lower * stride_h, left, right, along, inside)
        kept_upper, kept_lower = upper, lower
        value = tl.where(inside, ((1 - down) * above + down * below) * factor + term, 0.0)
        tl.store(out_ptr + i, value.to(out_ptr.dtype.element_ty), mask=i < row)
        out_ptr += row
        y += 1
    while y < end:
        tl.store(out_ptr + i, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=i < row)
        out_ptr += row
        y += 1


def image_table(images: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """(B, 8) int64 on the CPU, one row for each image: its address, height and width, the height and width it is
    resized to, and its three strides."""
    table = torch.tensor(_table_rows(images, sizes), device="cpu")
    return table.pin_memory() if images[0].is_cuda else table


def _table_rows(images: Sequence[Tensor], sizes: Sizes) -> list[list[int]]:
    return [
        [image.data_ptr(), *image.shape[1:], *size, image.stride(0) if len(image) > 1 else 0, *image.stride()[1:]]
        for image, size in zip(images, sizes, strict=True)
    ]


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _table_on_device(images: Sequence[Tensor], sizes: Sizes, device: torch.device) -> Tensor:
    """The table (B, 8) on the device. While a user's own CUDA graph is captured, it is filled number by number: each
    replay would repeat an upload, from host memory that was freed long before."""
    if not _is_capturing():
        return image_table(images, sizes).to(device, non_blocking=True)
    table = torch.empty((len(images), 8), dtype=torch.int64, device=device)
    for row, values in zip(table.unbind(), _table_rows(images, sizes), strict=True):
        for cell, value in zip(row.unbind(), values, strict=True):
            cell.fill_(value)
    return table


def launch_image_batch(
    table: Tensor, out: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Fills ``out``, which is channels_last, from the images of ``dtype`` in the table, which lies on its device."""
    batch, channels, height, width = out.shape
    top = 1.0 if dtype.is_floating_point else 255.0
    means, stds = (values * channels if len(values) == 1 else values for values in (list(mean), list(std)))
    with torch.cuda.device_of(out):
        _image_batch_kernel[(triton.cdiv(width * channels, _BLOCK), triton.cdiv(height, _ROWS), batch)](
            table, out, tuple(1 / (top * s) for s in stds), tuple(-m / s for m, s in zip(means, stds, strict=True)),
            height, width * channels, DTYPE=_DTYPES[dtype], C=channels, BLOCK=_BLOCK, ROWS=_ROWS, num_warps=2,
            enable_fp_fusion=True,
        )  # fmt: skip


@torch.library.custom_op("retina_fast::image_batch_", mutates_args=("out",))
def _image_batch_op(images: list[Tensor], sizes: list[int], mean: list[float], std: list[float], out: Tensor) -> None:
    """``sizes`` are flat: a height and a width an image."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    table = _table_on_device(images, pairs, out.device)
    launch_image_batch(table, out, images[0].dtype, mean, std)


@_image_batch_op.register_fake
def _(images, sizes, mean, std, out):
    return None


def kernel_serves(images: Sequence[Tensor], channels: int) -> bool:
    """Whether the kernel takes these images: of one known dtype, with 1 or ``channels`` channels, without gradients."""
    return (
        HAS_TRITON
        and images[0].dtype in _DTYPES
        and all(image.dtype == images[0].dtype and len(image) in (1, channels) for image in images)
        and not is_differentiated(*images)
    )


def image_batch(
    images: Sequence[Tensor],
    sizes: Sizes,
    mean: Sequence[float],
    std: Sequence[float],
    size_divisible: int = 32,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise, resize and pad images into one ``(B, C, H, W)`` batch of the first image's dtype.

    Args:
        images: B tensors ``(C, h, w)``, or ``(1, h, w)`` to be repeated; floating point, or uint8 in [0, 255], which
            becomes float32 in [0, 1].
        sizes: the (height, width) each is resized to, at least 1 pixel.
        mean: C means to subtract, or one for all channels.
        std: C standard deviations to divide by, or one.
        size_divisible: H and W are the largest sizes rounded up to a multiple of it.
        out: a batch of that shape to be filled, of any float dtype and memory format, on the images' device.

    Raises:
        ValueError: if the images, or ``out``, lie on different devices, or ``out`` has another shape.

    Example::

        >>> images = [torch.rand(3, 50, 70), torch.rand(3, 90, 40)]
        >>> image_batch(images, [(100, 140), (180, 80)], (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).shape
        torch.Size([2, 3, 192, 160])
    """
    first = images[0]
    shape = batch_shape(images, sizes, max(len(mean), len(std)), size_divisible)
    if out is None:
        dtype = first.dtype if first.is_floating_point() else torch.float32
        layout = torch.channels_last if first.is_cuda else torch.contiguous_format
        traced = [image for image in images if is_transformed(image)]
        if traced:  # vmap writes images of several batches only into what is a batch itself
            out = traced[0].new_empty(shape, dtype=dtype)
        else:
            out = torch.empty(shape, dtype=dtype, device=first.device, memory_format=layout)
    elif tuple(out.shape) != shape:
        raise ValueError(f"out must be {shape}, got {tuple(out.shape)}")
    elif out.device != first.device:
        raise ValueError(f"out must be on {first.device} as the images are, got {out.device}")
    served = runs_triton(out) and out.is_contiguous(memory_format=torch.channels_last)
    if served and kernel_serves(images, shape[1]):
        _image_batch_op(list(images), [side for size in sizes for side in size], list(mean), list(std), out)
        return out
    return image_batch_reference(images, sizes, mean, std, out)

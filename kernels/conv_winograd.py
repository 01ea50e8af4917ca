"""3x3 convs on a CPU by Winograd's algorithm: 36 multiplications for 4x4 outputs, where the definition takes 144.

    Y = A' [(G w G') * (B' d B)] A      4x4 outputs Y of a kernel w (3x3), from the 6x6 inputs d that they read

This is F(4x4, 3x3) of Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, section 4.2. Summed over the input
channels, the products of all tiles are 36 matrix products. B', G and A' follow from six points by the Toom-Cook
algorithm. The usual points 0, 1, -1, 2, -2 and infinity lose twice the accuracy of those here, which oneDNN took, too:
with 256 channels an output is 1.2e-6 from float64 in relative norm, that of oneDNN's direct conv 0.2e-6. Infinity and
NaN spread within their tile.

The transforms are products by matrices of 36x36 and 16x36, of some rows of tiles at a time. The gradient with respect
to the weights goes the same way backwards; that with respect to the input is a conv by the flipped weights.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTS = (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)  # and infinity
_OUT, _IN = 4, 6  # the sides of a tile of outputs, and of the inputs that it reads
_CHUNK = 1 << 20  # elements of transformed inputs that each thread makes at a time: threads seldom wait for each other
_BAND = 640  # tiles whose transforms are kept for one product: many enough to read the weights seldom


def _toom_cook() -> tuple[Tensor, Tensor, Tensor]:
    """A' (4, 6), G (6, 3) and B' (6, 6) in float64."""
    points = torch.tensor(_POINTS, dtype=torch.float64, device="cpu")
    finite = len(points)
    powers = points[:, None] ** torch.arange(_IN, device="cpu")
    out, kernel, inputs = (points.new_zeros(_IN, side) for side in (_OUT, 3, _IN))
    for i in range(finite):
        others = torch.cat((points[:i], points[i + 1 :]))
        out[i], kernel[i] = powers[i, :_OUT], powers[i, :3] / (points[i] - others).prod()
        inputs[i, :finite] = _product_of_roots(others)
    out[finite, -1] = kernel[finite, -1] = 1
    inputs[finite] = _product_of_roots(points)
    return out.T, kernel, inputs


def _product_of_roots(roots: Tensor) -> Tensor:
    """The coefficients of ``(x - roots[0]) (x - roots[1]) ...``, that of the lowest power first."""
    coefficients = roots.new_ones(1)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


_A, _G, _B = (torch.kron(matrix, matrix) for matrix in _toom_cook())  # of both axes: (16, 36), (36, 9), (36, 36)
_TO_OUTPUT, _FROM_OUTPUT, _TO_INPUT = _A.float(), _A.T.float().contiguous(), _B.float()


class Scratch:
    """Memory for what convs need while they run, and which one conv after the other takes. New memory in its place
    would be cleared page by page each time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy has memory of its own, none at first."""
        return Scratch, ()

    def take(self, *shapes: Sequence[int]) -> list[Tensor]:
        """Float32 tensors that nothing has been written into; they hold until the next call."""
        sizes = [math.prod(shape) for shape in shapes]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // 16) * 16)  # whole cache lines
        if ends[-1] > self._memory.numel():
            with torch.inference_mode(False):
                self._memory = torch.empty(ends[-1], dtype=torch.float32, device="cpu")
        starts = zip(ends, sizes, shapes, strict=False)
        return [self._memory[start : start + size].view(shape) for start, size, shape in starts]


class _Tiling(NamedTuple):
    """How the outputs of B images are divided into tiles. A chunk is some rows of tiles of one image, a band is some
    chunks, whose tiles are multiplied together."""

    height: int
    """Tiles from top to bottom of an image."""
    width: int
    """Tiles from left to right."""
    bands: list[list[tuple[int, int, int]]]
    """Chunks: image, first row of tiles, number of rows."""
    rows_of_chunk: int
    rows_of_band: int

    @classmethod
    def of(cls, x: Tensor, channels: int) -> "_Tiling":
        batch, (height, width) = x.shape[0], (-(-side // _OUT) for side in x.shape[2:])
        threads = torch.get_num_threads()
        step = max(1, min(height, threads * _CHUNK // (_IN * _IN * width * channels)))
        chunks = [(b, top, min(step, height - top)) for b in range(batch) for top in range(0, height, step)]
        count = -(-batch * height * width // _BAND)
        length = -(-len(chunks) // count)
        bands = [chunks[start : start + length] for start in range(0, len(chunks), length)]
        return cls(height, width, bands, step, max(sum(chunk[2] for chunk in band) for band in bands))

    def padded_shape(self, x: Tensor, border: int) -> tuple[int, int, int, int]:
        """The shape (B, H, W, C) of x extended to whole tiles, with a border at both sides."""
        high, wide = (side * _OUT + 2 * border for side in (self.height, self.width))
        return x.shape[0], high, wide, x.shape[1]

    def transforms(self, channels: int) -> tuple[int, int, int]:
        """The shape of the transforms of a band."""
        return _IN * _IN, self.rows_of_band, self.width * channels

    def chunk(self, side: int, channels: int) -> tuple[int, int, int, int, int]:
        """The shape of a chunk of tiles of ``side`` x ``side``, an element of all tiles after the other."""
        return side, side, self.rows_of_chunk, self.width, channels


def suits_winograd(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether :func:`winograd_conv` computes the conv of x (B, C_in, H, W) by weights (C_out, C_in / groups, kH, kW).

    It does not while PyTorch multiplies float32 matrices in lower precision, which the transforms would amplify.

    Example::

        >>> x, weight = torch.ones(1, 16, 9, 9), torch.ones(16, 16, 3, 3)
        >>> suits_winograd(x, weight, (1, 1), (1, 1), (1, 1), 1), suits_winograd(x, weight, (2, 2), (1, 1), (1, 1), 1)
        (True, False)
    """
    one = (1, 1)
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and tuple(weight.shape[1:]) == (x.shape[1], 3, 3)
        and (tuple(stride), tuple(padding), tuple(dilation), groups) == (one, one, one, 1)
        and x.numel() > 0
        and torch.get_float32_matmul_precision() == "highest"
    )


def gains_from_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`winograd_conv` is likely to be faster than a direct conv. With few channels the transforms take as
    long as they save; for few tiles reading the weights does, which are four times as large.

    Example::

        >>> gains_from_winograd(torch.ones(1, 256, 100, 100), torch.ones(256, 256, 3, 3))
        True
    """
    tiles = x.shape[0] * math.prod(-(-side // _OUT) for side in x.shape[2:])
    return min(weight.shape[:2]) >= 128 and tiles >= 36


def transform_weight(weight: Tensor) -> Tensor:
    """The weights (C_out, C_in, 3, 3) of a conv as :func:`winograd_conv` reads them: ``G w G'``, (36, C_in, C_out).

    Example::

        >>> tuple(transform_weight(torch.ones(8, 4, 3, 3)).shape)
        (36, 4, 8)
    """
    rows = weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
    return (_G.to(rows.dtype) @ rows).view(_IN * _IN, weight.shape[1], weight.shape[0])


def winograd_conv(
    x: Tensor,
    transformed: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str,
    scratch: Scratch,
    *,
    overwrite_z: bool = False,
) -> Tensor:
    """``activation(conv(x) + bias + z)`` of a 3x3 conv with stride 1 and padding 1; not differentiable.

    Args:
        x: ``(B, C_in, H, W)``, float32 on a CPU.
        transformed: from :func:`transform_weight`, ``(36, C_in, C_out)``.
        bias: ``(C_out,)``.
        z: of the output's shape.
        activation: ``none``, ``relu`` or ``swish``.
        scratch: lends memory while the conv runs.
        overwrite_z: whether the output may take the memory of z.

    Returns:
        ``(B, C_out, H, W)`` in channels_last.

    Example::

        >>> x, weight = torch.randn(1, 16, 9, 9), torch.randn(8, 16, 3, 3)
        >>> y = winograd_conv(x, transform_weight(weight), None, None, "none", Scratch())
        >>> torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-4)
        True
    """
    channels, out = transformed.shape[1:]
    tiling = _Tiling.of(x, max(channels, out))
    if overwrite_z and z is not None and z.is_contiguous(memory_format=torch.channels_last):
        y = z
    else:
        shape = x.shape[0], out, *x.shape[2:]
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded, inputs, products, tiles, results, pixels = scratch.take(
        tiling.padded_shape(x, 1),
        tiling.transforms(channels),
        tiling.transforms(out),
        tiling.chunk(_IN, channels),
        tiling.chunk(_OUT, out),
        tiling.chunk(_OUT, out),
    )
    windows = _windows(_pad(x, padded, 1), tiling, _IN)
    rows_of_y, rows_of_z = y.permute(0, 2, 3, 1), None if z is None else z.permute(0, 2, 3, 1)
    for band in tiling.bands:
        rows = _transform(_TO_INPUT, windows, band, tiles, inputs)
        torch.bmm(_matrices(inputs, rows, channels), transformed, out=_matrices(products, rows, out))
        row = 0
        for image, top, count in band:
            found, chunk = _first_rows(results, count), _first_rows(pixels, count).view(count, _OUT, -1, _OUT, out)
            torch.mm(_TO_OUTPUT, products[:, row : row + count].flatten(1), out=found.view(_OUT * _OUT, -1))
            by_element = chunk.permute(1, 3, 0, 2, 4)
            by_element.copy_(found) if bias is None else torch.add(found, bias, out=by_element)
            here = image, slice(_OUT * top, _OUT * (top + count))
            into = rows_of_y[here]
            inside = chunk.view(count * _OUT, -1, out)[: into.shape[0], : into.shape[1]]
            _finish(inside, None if rows_of_z is None else rows_of_z[here], activation, into)
            row += count
    return y


def winograd_weight_gradient(x: Tensor, dy: Tensor, scratch: Scratch) -> Tensor:
    """The gradient (C_out, C_in, 3, 3) of a 3x3 conv's weights, with stride 1 and padding 1.

    Args:
        x: the conv's input ``(B, C_in, H, W)``, float32 on a CPU.
        dy: the gradient of its output, ``(B, C_out, H, W)``.
        scratch: lends memory meanwhile.

    Example::

        >>> x, dy = torch.randn(1, 16, 9, 9), torch.randn(1, 8, 9, 9)
        >>> dw = winograd_weight_gradient(x, dy, Scratch())
        >>> torch.allclose(dw, torch.nn.grad.conv2d_weight(x, (8, 16, 3, 3), dy, padding=1), atol=1e-4)
        True
    """
    channels, out = x.shape[1], dy.shape[1]
    tiling = _Tiling.of(x, max(channels, out))
    padded, inputs, gradients, tiles, padded_dy, tiles_dy, total = scratch.take(
        tiling.padded_shape(x, 1),
        tiling.transforms(channels),
        tiling.transforms(out),
        tiling.chunk(_IN, channels),
        tiling.padded_shape(dy, 0),
        tiling.chunk(_OUT, out),
        (_IN * _IN, channels, out),
    )
    windows, windows_dy = _windows(_pad(x, padded, 1), tiling, _IN), _windows(_pad(dy, padded_dy, 0), tiling, _OUT)
    for band in tiling.bands:
        rows = _transform(_TO_INPUT, windows, band, tiles, inputs)
        _transform(_FROM_OUTPUT, windows_dy, band, tiles_dy, gradients)
        factors = _matrices(inputs, rows, channels).transpose(1, 2), _matrices(gradients, rows, out)
        torch.bmm(*factors, out=total) if band is tiling.bands[0] else total.baddbmm_(*factors)
    kernel = _G.T.float() @ total.view(_IN * _IN, -1)
    return kernel.view(3, 3, channels, out).permute(3, 2, 0, 1).contiguous()


def _pad(x: Tensor, padded: Tensor, border: int) -> Tensor:
    """Write x (B, C, H, W) into ``padded`` (B, H', W', C), with zeros around it."""
    bottom, right = border + x.shape[2], border + x.shape[3]
    for edge in (padded[:, :border], padded[:, bottom:], padded[:, :, :border], padded[:, :, right:]):
        edge.zero_()
    padded[:, border:bottom, border:right].copy_(x.permute(0, 2, 3, 1))
    return padded


def _windows(padded: Tensor, tiling: _Tiling, side: int) -> Tensor:
    """The inputs of all tiles as a view (side, side, B, tiles down, tiles across, C)."""
    image, row, column, _ = padded.stride()
    shape = side, side, padded.shape[0], tiling.height, tiling.width, padded.shape[3]
    return padded.as_strided(shape, (row, column, image, _OUT * row, _OUT * column, 1), padded.storage_offset())


def _transform(matrix: Tensor, windows: Tensor, band: list[tuple[int, int, int]], tiles: Tensor, into: Tensor) -> int:
    """Write the transforms of a band's tiles, and return how many rows of tiles they are."""
    row = 0
    for image, top, count in band:
        read = _first_rows(tiles, count).copy_(windows[:, :, image, top : top + count])
        torch.mm(matrix, read.view(matrix.shape[1], -1), out=into[:, row : row + count].flatten(1))
        row += count
    return row


def _first_rows(chunk: Tensor, count: int) -> Tensor:
    """The memory of a chunk as that of one with fewer rows of tiles."""
    side, _, rows, width, channels = chunk.shape
    return chunk.view(-1)[: chunk.numel() // rows * count].view(side, side, count, width, channels)


def _matrices(transforms: Tensor, rows: int, channels: int) -> Tensor:
    """The transforms of a band's first rows of tiles as 36 matrices, (tiles, channels) each."""
    return transforms.view(_IN * _IN, -1, channels)[:, : rows * (transforms.shape[2] // channels)]


def _finish(pixels: Tensor, z: Tensor | None, activation: str, y: Tensor) -> None:
    """Add z and apply the activation on the way from a chunk into its part of the output; all (rows, columns, C)."""
    if z is not None:
        torch.add(pixels, z, out=y)
    elif activation == "relu":
        torch.clamp_min(pixels, 0, out=y)
    else:
        y.copy_(pixels)
    if activation == "swish":
        F.silu(y, inplace=True)
    elif activation == "relu" and z is not None:
        y.relu_()

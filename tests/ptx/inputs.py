"""What the cases share: inputs, and the measure of a result's error."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from retina_fast.kernels.levels import flatten_all

SHAPES = ((11, 9), (5, 4), (1, 1))
"""Height and width of ragged levels."""

Shapes = Sequence[tuple[int, int]]


class Comparison(NamedTuple):
    """Of a result with its reference: the relative error in the Euclidean norm, and what it may be."""

    what: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


Run = Callable[[], Iterable[Comparison]]


def close(what: str, ours: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Comparison:
    """Compares what must agree up to rounding. What is not finite must be so at the same places."""
    a, b = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (ours, expected))
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(0.0), b[~finite].nan_to_num(0.0)) or not torch.equal(a.isnan(), b.isnan()):
        return Comparison(what, float("inf"), limit)
    norm = b[finite].norm().clamp(min=1e-300)
    return Comparison(what, float((a[finite] - b[finite]).norm() / norm), limit)


def equal(what: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Comparison:
    """Compares what must agree exactly."""
    same = all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    return Comparison(what, 0.0 if same else float("inf"), 0.0)


def limit_of(dtype: torch.dtype) -> float:
    """The error of results that are rounded to a dtype: to nearest leaves 0.85 of this in 16 bits, to zero 1.4."""
    return {torch.float32: 1e-5, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]


def shifted(x: Tensor, elements: int) -> Tensor:
    """The same values and strides in memory that begins ``elements`` later than an aligned address."""
    flat = torch.empty(x.numel() + elements, dtype=x.dtype)
    return flat.as_strided(x.shape, x.stride(), elements).copy_(x) if elements else x


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in float64 that want gradients."""
    return [x.double().requires_grad_() for x in tensors]


def head_outputs(
    generator: Generator, dtype: torch.dtype, channels: int, shapes: Shapes = SHAPES, scale: float = 1.0,
    mean: float = 0.0, shift: int = 0, batch: int = 2,
) -> list[Tensor]:  # fmt: skip
    """Levels (B, H*W*9, channels) as a head writes them; the first one's memory begins ``shift`` elements late."""
    levels = [torch.randn(batch, 9 * channels, h, w, generator=generator) * scale + mean for h, w in shapes]
    channels_last = [level.to(dtype).contiguous(memory_format=torch.channels_last) for level in levels]
    first, *others = flatten_all(channels_last, channels)
    return [shifted(first, shift), *others]


def random_boxes(generator: Generator, count: int, size: float = 80.0) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * size
    return torch.cat((corner, corner + 2 + torch.rand(count, 2, generator=generator) * size / 3), dim=1)


def boxes_near(boxes: Tensor, iou: float) -> Tensor:
    """Nine boxes within each of these (N, 4), whose IoU with it differs from ``iou`` by at most some units in the last
    place: which of them reach it depends on how every step of the IoU is rounded."""
    x1, y1, x2, y2 = boxes[:, None].expand(-1, 9, -1).unbind(-1)
    units = torch.arange(-4, 5) * 2.0**-23
    return torch.stack((x1, y1, x2, (y1 + iou * (y2 - y1)) * (1 + units)), dim=-1).flatten(0, 1)

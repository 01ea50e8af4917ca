"""A conv in float32 at chosen cells of a pyramid, of features that are held in eight bits."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 4096
"""So many cells are computed at a time, which bounds the memory that their neighbourhoods take in float32."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # once a process PyTorch says that sparse tensors are in beta
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu")


@dataclass(frozen=True)
class Codes:
    """How values are held in uint8: a code stands for ``scale * (code - zero)``."""

    scale: float
    zero: int

    def values(self, codes: Tensor) -> Tensor:
        """The float32 values of codes."""
        return (codes.float() - self.zero).mul_(self.scale)


class Pyramid(NamedTuple):
    """The cells of B images on L levels, counted level by level, image by image and row by row. Those of one level and
    image are a section."""

    batch: int
    sizes: list[int]
    """(L,) how many cells an image has on each level."""
    firsts: Tensor
    """(L * B + 1,) the first cell of each section; the last value is how many cells there are."""

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> "Pyramid":
        """The pyramid of levels (B, H, W, O)."""
        batch, sizes = len(levels[0]), [level.shape[1:3].numel() for level in levels]
        firsts = accumulate((size for size in sizes for _ in range(batch)), initial=0)
        return cls(batch, sizes, torch.tensor([*firsts], device=levels[0].device))

    def sections(self, cells: Tensor) -> Tensor:
        """(N,) for N cells: level * B + image."""
        return torch.bucketize(cells, self.firsts[1:-1], right=True)

    def of_images(self, cells: Tensor) -> Tensor:
        """The numbers of cells (B, M) that are counted level by level in each image alone."""
        if self.batch == 1:
            return cells
        sizes, images = cells.new_tensor(self.sizes), torch.arange(self.batch, device=cells.device)[:, None]
        ends = sizes.cumsum(0)
        levels = torch.bucketize(cells, ends, right=True)
        return cells + (ends - sizes)[levels] * (self.batch - 1) + sizes[levels] * images

    def places(self, cells: Tensor) -> list[Tensor]:
        """For each level those of N rising cells that it has, counted from its first cell on."""
        firsts = [*accumulate((self.batch * size for size in self.sizes), initial=0)]
        bounds = torch.searchsorted(cells, cells.new_tensor(firsts)).tolist()
        return [cells[start:stop] - first for first, (start, stop) in zip(firsts, pairwise(bounds), strict=False)]


@dataclass(frozen=True)
class LastConv:
    """A conv in float32, of stride 1, on features that are codes and have the border that its pads add.

    Attributes:
        weight: (O, C, kernel height, kernel width).
        bias: (O,).
        inputs: what a code of the features stands for, a level each.
    """

    weight: Tensor
    bias: Tensor
    inputs: tuple[Codes, ...]

    def everywhere(self, features: Tensor, level: int) -> Tensor:
        """The outputs (B, H, W, O) for the features (B, H + border, W + border, C) uint8 of a level."""
        values = self.inputs[level].values(features).permute(0, 3, 1, 2)
        return F.conv2d(values, self.weight, self.bias).permute(0, 2, 3, 1)

    def at(self, features: Sequence[Tensor], cells: Tensor) -> Tensor:
        """The outputs (N, O) at some cells.

        Args:
            features: of all levels, each as :meth:`everywhere` takes it.
            cells: (N,) rising, as a :class:`Pyramid` of the outputs counts them.
        """
        outputs = [self.bias.new_empty(len(self.bias), 0)]
        for some in cells.split(CELLS):
            values, scales = self._patches(features, some)
            outputs.append((self._factors() @ values.T).mul_(scales))
        return torch.cat(outputs, dim=1).add_(self.bias[:, None]).T

    def some_at(self, features: Sequence[Tensor], cells: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        """(W,) single outputs.

        Args:
            features: as :meth:`at` takes them.
            cells: likewise.
            rows: (W,) of which of the cells, rising.
            outputs: (W,) which ones.
        """
        every = torch.arange(len(cells) + 1, device=cells.device)
        starts = torch.searchsorted(rows, every)  # where each cell's begin among all
        products = [self.bias[:0]]
        for first in range(0, len(cells), CELLS):
            values, scales = self._patches(features, cells[first : first + CELLS])
            own = starts[first : first + CELLS + 1]
            part = slice(int(own[0]), int(own[-1]))
            none = self.bias.new_zeros(part.stop - part.start)
            size = len(values), len(self.bias)
            chosen = torch.sparse_csr_tensor(own - part.start, outputs[part], none, size)
            made = torch.sparse.sampled_addmm(chosen, values, self._factors().T, beta=0).values()
            products.append(made.mul_(scales[rows[part] - first]))
        return torch.cat(products).add_(self.bias[outputs])

    def _factors(self) -> Tensor:
        """(O, kernel height * kernel width * C)."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)  # a view of memory in channels_last

    def _patches(self, features: Sequence[Tensor], cells: Tensor) -> tuple[Tensor, Tensor]:
        """What the conv reads at N cells, (N, kernel height * kernel width * C) float32, and the scale (N,) of each."""
        batch, channels = len(features[0]), features[0].shape[3]
        down, right = (side - 1 for side in self.weight.shape[2:])
        constants, first = [], 0  # of each level
        for _, rows, columns, _ in (level.shape for level in features):
            beside = [y * columns + x for y in range(down + 1) for x in range(right + 1)]
            constants.append([first, columns - right, rows - down, down * columns, *beside])
            first += batch * (rows - down) * (columns - right)
        levels = torch.bucketize(cells, cells.new_tensor([first for first, *_ in constants[1:]]), right=True)
        own = cells.new_tensor(constants)[levels]
        place = cells - own[:, 0]
        line = place // own[:, 1]  # of all images
        corner = place + line * right  # the first place that it reads, as if in the first image
        if batch > 1:
            corner += line // own[:, 2] * own[:, 3]
        index, counts = corner[:, None] + own[:, 4:], torch.bincount(levels, minlength=len(features)).tolist()
        values = self.weight.new_empty(len(cells), index.shape[1] * channels)
        parts = zip(features, self.inputs, index.split(counts), values.split(counts), strict=True)
        for level, held, chosen, target in parts:
            target.view(-1, channels).copy_(level.view(-1, channels).index_select(0, chosen.flatten()))
            if held.zero:
                target -= held.zero
        return values, self.weight.new_tensor([held.scale for held in self.inputs])[levels]

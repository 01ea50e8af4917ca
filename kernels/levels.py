"""The heads' outputs as the operations read them: a list of levels, each lying in memory as its conv wrote it.

A level is ``(B, A*C, H, W)`` (a head's output) or ``(B, N, C)`` (already flattened, as torchvision concatenates them).
In channels_last memory the first is the second, so ``flatten`` is a view there and a copy only for NCHW.
"""

from collections.abc import Sequence

from torch import Tensor


def count_anchors(level: Tensor, channels: int) -> int:
    """How many anchors of ``channels`` values a level holds an image.

    Raises:
        ValueError: if the level is neither ``(B, A*channels, H, W)`` nor ``(B, N, channels)``.
    """
    fits = level.shape[1] % channels == 0 if level.dim() == 4 else level.dim() == 3 and level.shape[2] == channels
    if not fits:
        raise ValueError(f"a level must be (B, A*{channels}, H, W) or (B, N, {channels}), got {tuple(level.shape)}")
    return level.shape[1:].numel() // channels


def flatten(level: Tensor, channels: int) -> Tensor:
    """One level as ``(B, H*W*A, channels)``, anchors in torchvision's order: row, column, anchor of the cell."""
    anchors = count_anchors(level, channels)
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], anchors, channels) if level.dim() == 4 else level


def flatten_all(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Every level as ``(B, N_l, channels)``."""
    return [flatten(level, channels) for level in levels]

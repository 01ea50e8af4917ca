"""The heads' outputs as the operations read them: a list of levels, each lying in memory as its conv wrote it.

A level is ``(B, A*C, H, W)`` (a head's output) or ``(B, N, C)`` (already flattened, as torchvision concatenates them).
In channels_last memory the first is the second, so ``flatten`` is a view there and a copy only for NCHW.
"""

from collections.abc import Sequence

from torch import Tensor


def flatten(level: Tensor, channels: int) -> Tensor:
    """One level as ``(B, H*W*A, channels)``, anchors in torchvision's order: row, column, anchor of the cell."""
    if level.dim() == 4:
        b, c, h, w = level.shape
        if c % channels:
            raise ValueError(
                f"a level has {c} channels, which is no multiple of {channels}: shape {tuple(level.shape)}"
            )
        return level.permute(0, 2, 3, 1).reshape(b, h * w * (c // channels), channels)
    if level.dim() != 3 or level.shape[2] != channels:
        raise ValueError(f"a level must be (B, A*{channels}, H, W) or (B, N, {channels}), got {tuple(level.shape)}")
    return level


def flatten_all(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Every level as ``(B, N_l, channels)``."""
    return [flatten(level, channels) for level in levels]

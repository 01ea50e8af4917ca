"""The towers of convs in torchvision's heads, run over the levels."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from retina_fast.kernels.group_norm_relu import group_norm_relu
from retina_fast.stock import is_stock

Norm = Callable[[Sequence[Tensor], Tensor, Tensor, int, float], list[Tensor]]


def run_tower(tower: Any, levels: Sequence[Tensor], norm: Norm = group_norm_relu) -> list[Tensor]:
    """A tower's outputs of every level.

    On a GPU a tower of conv, GroupNorm and ReLU, as in torchvision's v2 heads, goes block by block: the norms of all
    levels are one call. Any other runs level by level, as it is.

    Args:
        tower: a head's ``conv``.
        levels: ``(B, C, H_l, W_l)``.
        norm: what stands in for GroupNorm and ReLU; tests put the kernels here where there is no GPU.
    """
    on_gpu = levels[0].is_cuda or norm is not group_norm_relu
    if not (on_gpu and is_stock(tower, nn.Sequential, "forward") and all(map(_is_stock_block, tower))):
        return [tower(level) for level in levels]
    for conv, group_norm, _ in tower:
        levels = [conv(level) for level in levels]
        levels = norm(levels, group_norm.weight, group_norm.bias, group_norm.num_groups, group_norm.eps)
    return list(levels)


def _is_stock_block(block: nn.Module) -> bool:
    """Whether it is torchvision's conv, GroupNorm with weights, ReLU; the conv may be of any kind."""
    return (
        is_stock(block, Conv2dNormActivation, "forward")
        and len(block) == 3  # type: ignore[arg-type]
        and is_stock(block[1], nn.GroupNorm, "forward")  # type: ignore[index]
        and block[1].affine  # type: ignore[index]
        and is_stock(block[2], nn.ReLU, "forward")  # type: ignore[index]
    )

"""Random weights in a tenth of the time: tensors are filled with numbers that were drawn before.

The tests build hundreds of models, and torch draws the weights of most twice, by a layer's own initialisation and by
its model's. Here a draw is a window of a pool of numbers, which torch's generator places: one seed gives the same
weights again, and two draws differ, though they may have numbers in common.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

POOL = 1 << 22
FEWEST, MOST = 1 << 10, 3 << 20
"""Elements of the tensors that are filled so. torch draws the others, and those of other kinds, itself."""


def quicken() -> None:
    """Has torch's `uniform_`, `normal_` and `nn.init.trunc_normal_` fill tensors from pools in this process."""
    if hasattr(Tensor.uniform_, "__wrapped__"):
        return
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(POOL, generator=generator) - 1  # like the others around 0, which most draws are
    normal = torch.randn(POOL, generator=generator)
    truncated = nn.init.trunc_normal_(torch.empty(POOL), generator=generator)
    draw: Any = Tensor.uniform_, Tensor.normal_, nn.init.trunc_normal_

    @functools.wraps(draw[0])
    def uniform_(tensor, a=0.0, b=1.0, *, generator=None):
        if generator or not _fill(tensor, uniform, (a + b) / 2, (b - a) / 2):
            draw[0](tensor, a, b, generator=generator)
        return tensor

    @functools.wraps(draw[1])
    def normal_(tensor, mean=0.0, std=1.0, *, generator=None):
        if generator or not _fill(tensor, normal, mean, std):
            draw[1](tensor, mean, std, generator=generator)
        return tensor

    @functools.wraps(draw[2])
    def trunc_normal_(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0, generator=None):
        at_two = (a, b) == (mean - 2 * std, mean + 2 * std)
        if generator or not at_two or not _fill(tensor, truncated, mean, std):
            draw[2](tensor, mean, std, a, b, generator)
        return tensor

    for holder, function in ((Tensor, uniform_), (Tensor, normal_), (nn.init, trunc_normal_)):
        setattr(holder, function.__name__, function)


@torch.no_grad()
def _fill(tensor: Tensor, pool: Tensor, shift: float, scale: float) -> bool:
    """Whether the tensor could be filled: its elements are then `shift + scale * x` of a window of the pool."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()
    if not plain or tensor.dtype != torch.float32 or not FEWEST <= tensor.numel() <= MOST:
        return False
    begin = int(torch.randint(POOL - tensor.numel(), ()))
    torch.mul(pool[begin : begin + tensor.numel()], scale, out=tensor.view(-1))
    if shift:
        tensor.add_(shift)
    return True

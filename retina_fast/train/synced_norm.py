"""BatchNorm over the batches of all processes of a run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Summed(torch.autograd.Function):
    """Sums a tensor over all processes, and its gradient, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return _Summed.forward(ctx, gradient)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes together, on any device.

    `nn.SyncBatchNorm`, torch's own, runs on GPUs only. Parameters and buffers are those of `nn.BatchNorm2d`.

    Example::

        >>> SyncedBatchNorm2d(8).eval()(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:  # (B, C, H, W)
        if not self.training:
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.full((), wide.numel() // wide.shape[1], dtype=wide.dtype, device=wide.device)
        dist.all_reduce(count)
        mean = _Summed.apply(wide.sum((0, 2, 3))) / count  # (C,)
        centred = wide - mean[:, None, None]
        variance = _Summed.apply(centred.square().sum((0, 2, 3))) / count
        self._update_running(mean.detach(), variance.detach() * (count / (count - 1)))
        normed = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is not None:
            normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(input.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running mean and variance (C,) towards those of this batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synced(model: nn.Module) -> nn.Module:
    """The model with BatchNorms over all processes: torch's on a GPU, :class:`SyncedBatchNorm2d` elsewhere.

    Example::

        >>> model = synced(model)  # doctest: +SKIP
    """
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # The state stays; only forward is another one.
    return model

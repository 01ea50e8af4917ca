"""torchvision's FrozenBatchNorm2d, which in mixed precision stays in the precision of its input."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import misc


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """BatchNorm2d whose statistics, scale and shift are fixed, as buffers.

    Where its input is of another dtype than its buffers, as under autocast, torchvision's turns the activations, and
    with them ReLU and residual sums, into float32: several passes of twice the bytes, kept for backward. Here it is one
    pass, computed in float32 and returned in the input's dtype, as ``nn.BatchNorm2d`` does. In one dtype it is
    torchvision's, to the last bit.

    Example::

        >>> import torch
        >>> norm = FrozenBatchNorm2d(8)
        >>> norm(torch.rand(1, 8, 4, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W), scaled and shifted channel by channel."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def as_torchvision(module: nn.Module) -> None:
    """Makes the frozen norms within a module torchvision's own, in place."""
    for part in module.modules():
        if type(part) is FrozenBatchNorm2d:
            part.__class__ = misc.FrozenBatchNorm2d

"""torchvision's FrozenBatchNorm2d, which in mixed precision stays in the precision of its input."""

import torch
from torch import Tensor, nn
from torchvision.ops import misc


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """BatchNorm2d whose statistics, scale and shift are fixed, as buffers.

    If the input's dtype differs from the buffers', as under autocast, torchvision's norm returns float32, so that ReLU
    and residual sums are float32, too: several passes over twice the bytes, all kept for backward. This norm takes one
    pass: it computes in float32 and returns the input's dtype, as ``nn.BatchNorm2d`` does. If the dtypes are the same,
    its result is torchvision's to the last bit.

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
        # F.batch_norm of PyTorch 2.11 refuses the eps of 0 that torchvision's pretrained RetinaNet has
        moments = self.running_mean, self.running_var
        return torch.batch_norm(x, self.weight, self.bias, *moments, False, 0.0, self.eps, torch.backends.cudnn.enabled)


def as_torchvision(module: nn.Module) -> None:
    """Makes the frozen norms within a module torchvision's own, in place."""
    for part in module.modules():
        if type(part) is FrozenBatchNorm2d:
            part.__class__ = misc.FrozenBatchNorm2d

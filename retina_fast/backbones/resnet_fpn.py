"""ResNets with a feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144), as torchvision builds them."""

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.resnet import ResNet
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7


def resnet_fpn(resnet: ResNet, trainable_layers: int, p6_from_c5: bool) -> BackboneWithFPN:
    """P3..P7 at strides 8..128 with 256 channels; P6 from C5 (torchvision's v2) or from P5 (its v1).

    Args:
        resnet: the trunk; its classifier is dropped.
        trainable_layers: how many of its five stages, counted from the last, are trained.
        p6_from_c5: which map P6 is computed from.

    Example::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> backbone = resnet_fpn(resnet18(), trainable_layers=5, p6_from_c5=False)
        >>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, 128, 128)).values()][:2]
        [(1, 256, 16, 16), (1, 256, 8, 8)]
    """
    extra = LastLevelP6P7(resnet.inplanes if p6_from_c5 else 256, 256)
    return _resnet_fpn_extractor(resnet, trainable_layers, returned_layers=[2, 3, 4], extra_blocks=extra)


class _LastLevelConv(ExtraFPNBlock):
    """One coarser level, a strided conv of the last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return [*results, self.conv(results[-1])], [*names, "last"]


def resnet_fpn_lite(resnet: ResNet, channels: int = 64) -> BackboneWithFPN:
    """Four levels at strides 4..32 from the first three stages of a ResNet, for small objects and small machines."""
    width = resnet.inplanes // 8  # channels of the first stage
    layers = {"layer1": "0", "layer2": "1", "layer3": "2"}
    in_channels = [width, 2 * width, 4 * width]
    return BackboneWithFPN(resnet, layers, in_channels, channels, extra_blocks=_LastLevelConv(channels))

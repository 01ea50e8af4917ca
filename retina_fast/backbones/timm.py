"""Any feature extractor of timm (https://github.com/huggingface/pytorch-image-models) with a feature pyramid."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


class TimmFPN(nn.Module):
    """The extractor's maps at strides 8, 16 and 32 to P3..P7, as torchvision's pyramid makes them."""

    def __init__(self, body: Any, out_channels: int, p6_from_c5: bool) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.is_channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        channels = body.feature_info.channels()
        extra = LastLevelP6P7(channels[-1] if p6_from_c5 else out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        if self.is_channels_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        return self.fpn(OrderedDict((f"p{i}", level) for i, level in enumerate(maps, start=3)))


def timm_fpn(
    name: str, pretrained: bool = False, out_channels: int = 256, p6_from_c5: bool = False, **kwargs: Any
) -> TimmFPN:
    """P3..P7 at strides 8..128 from a model of timm, by name: a backbone for :class:`retina_fast.RetinaNet`.

    Args:
        name: of a model whose last three feature maps have strides 8, 16 and 32; ``timm.list_models()`` has the names.
        pretrained: whether timm downloads its weights.
        out_channels: of each level.
        p6_from_c5: which map P6 is computed from: C5 as in torchvision's v2, or P5 as in its v1.
        **kwargs: arguments of ``timm.create_model``, such as ``drop_path_rate`` or, for models of one image size,
            ``img_size``.

    Raises:
        ModuleNotFoundError: without timm (``pip install timm``).
        ValueError: for a model whose last feature maps have other strides, naming them.
        RuntimeError: by timm, for a name that it does not know or a model without feature extraction.

    Example::

        >>> import torch
        >>> from retina_fast import RetinaNet
        >>> model = RetinaNet(timm_fpn("test_convnext", out_channels=16), num_classes=3).eval()
        >>> [tuple(level.shape) for level in model.backbone(torch.rand(1, 3, 128, 128)).values()][0]
        (1, 16, 16, 16)
    """
    import timm

    body: Any = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-3, -2, -1), **kwargs)
    strides = body.feature_info.reduction()
    if strides != [8, 16, 32]:
        raise ValueError(
            f"name must be a model whose last maps have strides 8, 16 and 32, those of {name} have {strides}"
        )
    return TimmFPN(body, out_channels, p6_from_c5)

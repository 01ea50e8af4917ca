"""Mobile SpineNet: the scale-permuted backbone with inverted bottlenecks, for phones and processors.

It is that of Du et al. 2020 (https://arxiv.org/abs/2010.11426). Two programs of its authors are public and differ: one
for TPUs (``spinenet_mbconv.py`` in https://github.com/tensorflow/tpu), which has size 49 alone, and its later rewrite
in Keras (``spinenet_mobile.py`` in https://github.com/tensorflow/models). Where they disagree, this file follows:

- widths: Keras. They are truncated, where the other rounds them to multiples of 8; size 49 is the same in both.
- activations: the TPU program by default, swish with a sigmoid gate; ``hardswish`` is the Keras one's, with its gate.
- repeated blocks, which no published size has, are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from retina_fast.backbones.specification import MOBILE_KINDS, MOBILE_SPINENET, MOBILE_STEM, checked
from retina_fast.backbones.spinenet import ScalePermuted, initialise
from retina_fast.heads import batch_norm

MOBILE_WIDTHS = {0: 8, 1: 16, 2: 24, 3: 40, 4: 80, 5: 112, 6: 112, 7: 112}
"""Output channels of a block by its level; 0 is the first conv."""
MOBILE_EXPANSION = 6
"""Channels inside a block / channels of its input."""
_SQUEEZE = 0.2  # channels between squeeze and excitation / channels of the block's input
_GATES = {nn.SiLU: nn.Sigmoid, nn.Hardswish: nn.Hardsigmoid}


class MobileSize(NamedTuple):
    """What the published mobile detectors of one size are made of."""

    width: float
    """All widths are multiplied by it and truncated."""
    out_channels: int
    """Of each level, and of the convs of the heads."""
    image_size: int
    """Pixels of an image's longer side."""
    head_depth: int = 4
    anchor_base: int = 3
    """Side of a level's smallest anchor, in strides."""

    @property
    def head_width(self) -> int:
        return self.out_channels


MOBILE_SIZES = {"49": MobileSize(1.0, 48, 384), "49s": MobileSize(0.65, 40, 384), "49xs": MobileSize(0.6, 24, 256)}


def mobile_width(level: int, width: float) -> int:
    """Channels of a level's blocks.

    Example::

        >>> mobile_width(5, 0.65)  # 72.8, truncated
        72
    """
    return max(1, int(MOBILE_WIDTHS[level] * width))


def squeezed(channels: int) -> int:
    """Channels between squeeze and excitation in a block with so many input channels.

    Example::

        >>> squeezed(24), squeezed(4)
        (4, 1)
    """
    return max(1, int(channels * _SQUEEZE))


class MobileSpineNet(ScalePermuted):
    """Maps ``(B, 3, H, W)`` to a dict of P3..P7, as :class:`retina_fast.backbones.spinenet.SpineNet` does.

    Args:
        specification: rows ``(level, "mbconv", (parent, parent), is_output)``; see ``specification.checked``.
        width: factor of all widths.
        out_channels: of each level.
        activation: ``silu`` (swish) or ``hardswish``.
        stochastic_depth: probability that, in training, the branch of the last row's block is dropped for an image. It
            grows linearly from row to row.
        norm_layer: from channels to a norm; BatchNorm with momentum 0.01 and eps 1e-3 by default.

    Raises:
        ValueError: for a specification that ``checked`` refuses, or an unknown activation.

    Example::

        >>> import torch
        >>> levels = MobileSpineNet(width=0.3, out_channels=8)(torch.rand(2, 3, 128, 256))
        >>> [tuple(level.shape[1:]) for level in levels.values()]
        [(8, 16, 32), (8, 8, 16), (8, 4, 8), (8, 2, 4), (8, 1, 2)]
    """

    activations: ClassVar = {"silu": nn.SiLU, "hardswish": nn.Hardswish}

    def __init__(
        self,
        specification: Iterable[Sequence[Any]] = MOBILE_SPINENET,
        width: float = 1.0,
        out_channels: int = 48,
        activation: str = "silu",
        stochastic_depth: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = batch_norm,
    ) -> None:
        conv = self.conv_layer(activation, norm_layer)
        channels = mobile_width(0, width)
        super().__init__(checked(specification, MOBILE_KINDS), out_channels, conv(3, channels, 3, 2))
        blocks = (*MOBILE_STEM, *self.specification)
        for row, block in enumerate(blocks, start=-len(MOBILE_STEM)):
            drop = stochastic_depth * max(0, row + 1) / len(self.specification)
            outputs = mobile_width(block.level, width)
            if row >= 0:
                levels = [blocks[parent].level for parent in block.parents]
                links = [_link(conv, mobile_width(level, width), outputs, block.level - level) for level in levels]
                self.links.append(nn.ModuleList(links))
                channels = outputs
            stride = 2 if row == -1 else 1
            self.blocks.append(InvertedBottleneck(conv, channels, outputs, stride, drop))
            channels = outputs
            if block.is_output:
                self.outputs[str(block.level)] = conv(outputs, out_channels, 1)
        self.act = self.activations[activation](inplace=True)
        initialise(self)

    @classmethod
    def of_size(cls, size: str | MobileSize, **kwargs: Any) -> "MobileSpineNet":
        """The network of a size, the published ones being 49, 49s and 49xs.

        Args:
            size: its name, or widths of one's own.
            **kwargs: other arguments of the class.

        Raises:
            ValueError: for a size that there is not.

        Example::

            >>> sum(p.numel() for p in MobileSpineNet.of_size("49xs").parameters())
            842456
        """
        if isinstance(size, str) and size not in MOBILE_SIZES:
            raise ValueError(f"size must be one of {', '.join(MOBILE_SIZES)}, got {size!r}")
        row = MOBILE_SIZES[size] if isinstance(size, str) else size
        return cls(width=row.width, out_channels=row.out_channels, **kwargs)


class InvertedBottleneck(nn.Module):
    """``branch(x) + x``, or the branch alone where the shape changes; no activation follows."""

    def __init__(self, conv: Any, in_channels: int, out_channels: int, stride: int, drop: float) -> None:
        super().__init__()
        inside = in_channels * MOBILE_EXPANSION
        activation_layer = conv.keywords["activation_layer"]
        self.branch = nn.Sequential(
            conv(in_channels, inside, 1),
            conv(inside, inside, 3, stride, groups=inside),
            SqueezeExcitation(inside, squeezed(in_channels), activation_layer, _GATES[activation_layer]),
            conv(inside, out_channels, 1, activation_layer=None),
            StochasticDepth(drop, "row"),
        )
        self.has_shortcut = in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + y if self.has_shortcut else y


def _link(conv: Any, in_channels: int, out_channels: int, down: int) -> nn.Sequential:
    """Resampling from one block to the input of another: change the scale, then the channels."""
    steps: list[nn.Module] = [conv(in_channels, in_channels, 3, 2, groups=in_channels) for _ in range(down)]
    if down < 0:
        steps.append(nn.Upsample(scale_factor=2**-down))
    return nn.Sequential(*steps, conv(in_channels, out_channels, 1, activation_layer=None))

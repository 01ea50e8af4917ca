"""SpineNet (Du et al. 2020, https://arxiv.org/abs/1912.05027): a scale-permuted backbone, built from a specification.

Its blocks go up and down in scale, joined by resampling links, and five of them are the feature maps P3..P7: no feature
pyramid follows. Widths, depths and rules are those of the published code, https://github.com/tensorflow/tpu.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, StochasticDepth

from retina_fast.backbones.specification import LEARNED, OUTPUT_LEVELS, SPINENET, STEM, Block, added_raw, checked
from retina_fast.heads import batch_norm
from retina_fast.transform import padded

WIDTHS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # of the 3x3 convs, by level
FUSION_EPS = 1e-4  # added to the sum of learned factors, as Tan et al. do
EXPANSION = {"bottleneck": 4, "residual": 1}  # output channels of a block / channels of its 3x3 convs


class Size(NamedTuple):
    """What the published detectors of one size are made of."""

    width: float
    """All widths but the stem's first conv are multiplied by it and truncated."""
    alpha: float
    """Width inside a link, as a part of the width of the block it comes from."""
    repeats: int
    """How often each block is repeated."""
    out_channels: int
    head_width: int
    head_depth: int
    image_size: int
    """Pixels of an image's longer side."""
    anchor_base: int
    """Side of a level's smallest anchor, in strides."""


SIZES = {
    # The published code has 128 output channels, the published checkpoint 256, which gives its 11.9 M parameters.
    "49s": Size(0.65, 0.5, 1, 256, 128, 4, 640, 3),
    "49": Size(1.0, 0.5, 1, 256, 256, 4, 640, 3),
    "96": Size(1.0, 0.5, 2, 256, 256, 4, 1024, 3),
    "143": Size(1.0, 1.0, 3, 256, 256, 4, 1280, 4),
    "190": Size(1.3, 1.0, 4, 512, 512, 7, 1280, 4),
}


class ScalePermuted(nn.Module):
    """The way through a scale-permuted network, which its families share.

    A family adds the modules: the stem's two ``blocks``; for each row of the specification two ``links``, a block and,
    if it is an output, a conv in ``outputs``; and ``act``, which follows the sum of the links. ``fusions`` has the
    learned factors of a row's two links.

    Args:
        specification: checked.
        out_channels: of each level.
        stem: from an image to the input of the first block.
    """

    size_divisible = 2 ** OUTPUT_LEVELS[-1]
    activations: ClassVar[Mapping[str, type[nn.Module]]]
    """Those of the family, by name."""
    act: nn.Module

    def __init__(self, specification: tuple[Block, ...], out_channels: int, stem: nn.Module) -> None:
        super().__init__()
        self.specification, self.out_channels = specification, out_channels
        self.added_raw = added_raw(specification)
        self.stem = stem
        self.blocks = nn.ModuleList()
        self.links = nn.ModuleList()
        self.outputs = nn.ModuleDict()
        learned = [str(row) for row, block in enumerate(specification) if block.fusion == LEARNED]
        self.fusions = nn.ParameterDict({row: nn.Parameter(torch.ones(2)) for row in learned})

    @classmethod
    def conv_layer(cls, activation: str, norm_layer: Callable[[int], nn.Module]) -> partial[Conv2dNormActivation]:
        """What makes the convs of a network, each with its norm and activation.

        Raises:
            ValueError: for an activation that the family does not have.
        """
        if activation not in cls.activations:
            raise ValueError(f"activation must be one of {', '.join(cls.activations)}, got {activation!r}")
        layer = cls.activations[activation]
        return partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0](self.stem(padded(x, self.size_divisible)))
        numbered = [first, self.blocks[1](first)]
        levels = {}
        for row, block in enumerate(self.specification):
            joined = self.join(row, [numbered[parent] for parent in block.parents])
            merged = sum((numbered[earlier] for earlier in self.added_raw[row]), joined)
            numbered.append(self.blocks[row + 2](self.act(merged)))
            if block.is_output:
                levels[block.level] = self.outputs[str(block.level)](numbered[-1])
        return {f"p{level}": levels[level] for level in OUTPUT_LEVELS}

    def join(self, row: int, parents: Sequence[Tensor]) -> Tensor:
        """The sum of a row's two parents, each resampled by its link, by the factors of its fusion."""
        links: Any = self.links[row]
        a, b = (link(parent) for link, parent in zip(links, parents, strict=True))
        factors: Any = self.specification[row].fusion
        if factors is None:
            return a + b
        if factors == LEARNED:
            positive = self.fusions[str(row)].relu()
            factors = positive / (positive.sum() + FUSION_EPS)
        return a * factors[0] + b * factors[1]


class SpineNet(ScalePermuted):
    """Maps ``(B, 3, H, W)`` to a dict of P3..P7, ``p3`` of ``(B, out_channels, H/8, W/8)`` to ``p7``, of stride 128.

    An input whose sides are not multiples of 128 is padded with zeros at the right and at the bottom, so that the
    levels are those of the padded size; ``retina_fast.RetinaNet`` reads ``size_divisible`` and pads its batches to it.

    Args:
        specification: rows ``(level, kind, (parent, parent), is_output)``; see ``specification.checked``.
        width: factor of all widths but the stem's first conv, which has 64.
        alpha: width inside a link, as a part of the width of the block it comes from.
        repeats: how often each block is repeated.
        out_channels: of each level.
        activation: ``relu`` or ``silu`` (swish).
        stochastic_depth: probability that, in training, a residual branch of the last row is dropped for an image; 0.2
            in protocol C. The probability grows linearly from row to row (Huang et al. 2016).
        norm_layer: from channels to a norm; BatchNorm with momentum 0.01 and eps 1e-3 by default. For several
            processes, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` turns a finished model's.

    Raises:
        ValueError: for a specification that ``checked`` refuses, or an unknown activation.

    Example::

        >>> import torch
        >>> levels = SpineNet(width=0.1)(torch.rand(2, 3, 100, 200))  # padded to 128x256
        >>> [tuple(level.shape[2:]) for level in levels.values()]
        [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    """

    activations: ClassVar = {"relu": nn.ReLU, "silu": nn.SiLU}

    def __init__(
        self,
        specification: Iterable[Sequence[Any]] = SPINENET,
        width: float = 1.0,
        alpha: float = 0.5,
        repeats: int = 1,
        out_channels: int = 256,
        activation: str = "relu",
        stochastic_depth: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = batch_norm,
    ) -> None:
        conv = self.conv_layer(activation, norm_layer)
        super().__init__(checked(specification), out_channels, nn.Sequential(conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)))
        for row, block in enumerate((*STEM, *self.specification), start=-len(STEM)):
            drop = stochastic_depth * max(0, row + 1) / len(self.specification)
            channels = max(1, int(WIDTHS[block.level] * width))
            group = _Repeated(conv, block, 64 if row == -len(STEM) else None, channels, repeats, drop)
            if row >= 0:
                pairs = zip(block.parents, block.alphas or (alpha, alpha), strict=True)
                self.links.append(nn.ModuleList(_link(conv, self.blocks[x], group, own) for x, own in pairs))
            if block.is_output:
                self.outputs[str(block.level)] = conv(group.channels, out_channels, 1)
            self.blocks.append(group)
        self.act = self.activations[activation](inplace=True)
        initialise(self)

    @classmethod
    def of_size(cls, size: str | Size, **kwargs: Any) -> "SpineNet":
        """The network of a size, the published ones being 49s, 49, 96, 143 and 190.

        Args:
            size: its name, or widths and depths of one's own.
            **kwargs: other arguments of the class.

        Raises:
            ValueError: for a size that there is not.

        Example, with torchvision's heads and anchors::

            >>> from retina_fast import RetinaNet
            >>> model = RetinaNet(SpineNet.of_size("49s"), num_classes=3).eval()
            >>> sum(p.numel() for p in model.backbone.parameters())
            9472959
        """
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        row = SIZES[size] if isinstance(size, str) else size
        return cls(width=row.width, alpha=row.alpha, repeats=row.repeats, out_channels=row.out_channels, **kwargs)


class _Repeated(nn.Sequential):
    """One block of a specification, its residual blocks one after the other, all of stride 1."""

    def __init__(self, conv: Any, block: Block, in_channels: int | None, width: int, repeats: int, drop: float) -> None:
        channels = width * EXPANSION[block.kind]
        inputs = [in_channels or channels, *[channels] * (repeats - 1)]
        super().__init__(*(Residual(conv, block.kind, x, width, drop) for x in inputs))
        self.level, self.width, self.channels = block.level, width, channels


class Residual(nn.Module):
    """``act(branch(x) + shortcut(x))``; the branch ends in a conv and its norm, which stochastic depth may drop."""

    def __init__(self, conv: Any, kind: str, in_channels: int, width: int, drop: float) -> None:
        super().__init__()
        channels = width * EXPANSION[kind]
        last = partial(conv, activation_layer=None)
        if kind == "bottleneck":
            branch = [conv(in_channels, width, 1), conv(width, width, 3), last(width, channels, 1)]
        else:
            branch = [conv(in_channels, width, 3), last(width, width, 3)]
        self.branch = nn.Sequential(*branch, StochasticDepth(drop, "row"))
        self.shortcut = nn.Identity() if in_channels == channels else last(in_channels, channels, 1)
        self.act = conv.keywords["activation_layer"](inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


def _link(conv: Any, source: Any, target: Any, alpha: float) -> nn.Sequential:
    """Resampling from one block to the input of another: narrow, change the scale, widen."""
    inside = max(1, int(source.width * alpha))
    steps: list[nn.Module] = [conv(source.channels, inside, 1)]
    down = target.level - source.level
    if down > 0:
        steps.append(conv(inside, inside, 3, 2))
    if down > 1:  # one pool for the rest of the factor
        kernel = 3 if down == 2 else 5
        steps.append(nn.MaxPool2d(kernel, 2 ** (down - 1), kernel // 2))
    if down < 0:
        steps.append(nn.Upsample(scale_factor=2**-down))
    return nn.Sequential(*steps, conv(inside, target.channels, 1, activation_layer=None))


def initialise(network: nn.Module) -> None:
    """Give convs weights of variance 1 / fan-in, by a normal cut at two standard deviations as the published code draws
    it, and biases of zero.

    Example::

        >>> conv = nn.Conv2d(64, 64, 3)
        >>> initialise(conv)
        >>> abs(conv.weight.var().item() * 64 * 9 - 1) < 0.1
        True
    """
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            std = 1 / math.sqrt(conv.weight[0].numel()) / 0.87962566103423978
            nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

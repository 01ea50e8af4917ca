"""SpineNet (Du et al. 2020, https://arxiv.org/abs/1912.05027): a scale-permuted backbone, built from plain data.

Blocks are numbered in the order they are built. Two of the stem come first, 0 and 1, both at level 2 (stride 4). Each
row of a specification is one more block, at a level of its own choice (level l has stride 2^l), fed by two earlier ones
through resampling links. One block for each of the levels 3 to 7 is an output: P3..P7, so that no pyramid has to follow.
Widths, depths and published figures are checked against https://github.com/tensorflow/tpu.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, StochasticDepth

from retina_fast.heads import batch_norm
from retina_fast.transform import padded

_WIDTHS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # of the 3x3 convs, by level
_EXPANSION = {"bottleneck": 4, "residual": 1}  # a block's outputs for each channel of its 3x3 convs
_OUTPUT_LEVELS = range(3, 8)
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Block(NamedTuple):
    """One row of a specification."""

    level: int
    """2 to 7."""
    kind: str
    """``bottleneck`` (1x1, 3x3, 1x1 to four times the width) or ``residual`` (two 3x3)."""
    parents: tuple[int, int]
    """The numbers of two earlier blocks."""
    is_output: bool = False
    """Whether it is the feature map of its level, 3 to 7."""


_STEM_BLOCKS = (Block(2, "bottleneck", (0, 0)), Block(2, "bottleneck", (0, 0)))  # not fed by links
_STEM = len(_STEM_BLOCKS)

SPINENET = (  # the numbers of the blocks are 2 to 16
    Block(2, "bottleneck", (0, 1)),
    Block(4, "residual", (0, 1)),
    Block(3, "bottleneck", (2, 3)),
    Block(4, "bottleneck", (2, 4)),
    Block(6, "residual", (3, 5)),
    Block(4, "bottleneck", (3, 5)),
    Block(5, "residual", (6, 7)),
    Block(7, "residual", (6, 8)),
    Block(5, "bottleneck", (8, 9)),
    Block(5, "bottleneck", (8, 10)),
    Block(4, "bottleneck", (5, 10), True),
    Block(3, "bottleneck", (4, 10), True),
    Block(5, "bottleneck", (7, 12), True),
    Block(7, "bottleneck", (5, 14), True),
    Block(6, "bottleneck", (12, 14), True),
)
"""The permutation that the paper's search found; the sizes differ in width and depth only."""


class Size(NamedTuple):
    """What the published detectors of one size are made of."""

    width: float
    """Factor of all widths but the stem's first conv, truncated."""
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
    # 128 output channels in the published code, 256 in the published checkpoint, whose 11.9 M parameters these are
    "49s": Size(0.65, 0.5, 1, 256, 128, 4, 640, 3),
    "49": Size(1.0, 0.5, 1, 256, 256, 4, 640, 3),
    "96": Size(1.0, 0.5, 2, 256, 256, 4, 1024, 3),
    "143": Size(1.0, 1.0, 3, 256, 256, 4, 1280, 4),
    "190": Size(1.3, 1.0, 4, 512, 512, 7, 1280, 4),
}


def checked(specification: Iterable[Sequence[Any]]) -> tuple[Block, ...]:
    """The rows as blocks.

    Args:
        specification: rows ``(level, kind, (parent, parent), is_output)``, the last False where it is left out.

    Raises:
        ValueError: naming the row (from 0) and the block (from 2), for a row of another form, a level or kind that
            there is not, a parent that is not an earlier block, twice the same parent, an output of level 2, a second
            output of a level, a level without an output, or a block that nothing uses.

    Example::

        >>> checked([*SPINENET[:3], (4, "bottleneck", (2, 7))])
        Traceback (most recent call last):
        ValueError: row 3 (block 5): parent 7 does not come earlier, choose from 0 to 4
    """
    blocks: list[Block] = []
    outputs: dict[int, int] = {}

    def refuse(row: int, problem: str) -> ValueError:
        return ValueError(f"row {row} (block {row + _STEM}): {problem}")

    row = -1
    for row, content in enumerate(specification):
        try:
            level, kind, (a, b), *rest = content
            (is_output,) = rest or (False,)
        except (TypeError, ValueError):
            raise refuse(row, f"must be (level, kind, (parent, parent), is_output), got {content!r}") from None
        if type(level) is not int or level not in _WIDTHS:
            raise refuse(row, f"level must be one of 2 to 7, got {level!r}")
        if kind not in _EXPANSION:
            raise refuse(row, f"kind must be bottleneck or residual, got {kind!r}")
        for parent in (a, b):
            if type(parent) is not int or not 0 <= parent < row + _STEM:
                raise refuse(row, f"parent {parent!r} does not come earlier, choose from 0 to {row + _STEM - 1}")
        if a == b:
            raise refuse(row, f"its parents must be two, got {a} twice")
        if type(is_output) is not bool:
            raise refuse(row, f"is_output must be True or False, got {is_output!r}")
        if is_output and level not in _OUTPUT_LEVELS:
            raise refuse(row, f"an output must be of level 3 to 7, got {level}")
        if is_output and level in outputs:
            raise refuse(row, f"row {outputs[level]} is already the output of level {level}")
        if is_output:
            outputs[level] = row
        blocks.append(Block(level, kind, (a, b), is_output))
    for level in _OUTPUT_LEVELS:
        if level not in outputs:
            raise ValueError(f"up to row {row}, the last, no row is an output of level {level}")
    used = {0, *(parent for block in blocks for parent in block.parents)}  # block 1 uses block 0
    used.update(number for numbers in added_raw(blocks) for number in numbers)
    if 1 not in used:
        raise ValueError(f"up to row {row}, the last, no row has block 1, the end of the stem, as a parent")
    for row, block in enumerate(blocks):
        if not block.is_output and row + _STEM not in used:
            raise refuse(row, "nothing uses it: make it a parent of a later row")
    return tuple(blocks)


def added_raw(blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """For each row, the blocks whose outputs are added to its input as they are, without a link.

    To an output block: the earlier blocks of the same level and channels that are nobody's parent so far. Of the
    published specification this is block 11, which feeds block 14 and nothing else.

    Example::

        >>> [(row + 2, blocks) for row, blocks in enumerate(added_raw(SPINENET)) if blocks]
        [(14, (11,))]
    """
    parents = {0}  # of block 1
    added = []
    for row, block in enumerate(blocks):
        parents.update(block.parents)
        added.append(
            tuple(
                number
                for number, other in enumerate([*_STEM_BLOCKS, *blocks[:row]])
                if block.is_output and number not in parents and (other.level, other.kind) == (block.level, block.kind)
            )
        )
    return added


class SpineNet(nn.Module):
    """Maps ``(B, 3, H, W)`` to P3..P7, ``{"p3": (B, out_channels, H/8, W/8), ..., "p7": (B, out_channels, H/128, W/128)}``.

    An input whose sides are not multiples of 128 is padded with zeros at the right and at the bottom, so that the
    levels are those of the padded size; ``retina_fast.RetinaNet`` reads ``size_divisible`` and pads its batches to it.

    Args:
        specification: rows ``(level, kind, (parent, parent), is_output)``; see :func:`checked`.
        width: factor of all widths but the stem's first conv, which has 64.
        alpha: width inside a link, as a part of the width of the block it comes from.
        repeats: how often each block is repeated.
        out_channels: of each level.
        activation: ``relu`` or ``silu`` (swish).
        stochastic_depth: probability that the last row's residual branches are dropped for an image of a training
            batch; it grows to that row by row (Huang et al. 2016).
        norm_layer: from channels to a norm; BatchNorm with momentum 0.01 and eps 1e-3 by default. For several
            processes, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` turns a finished model's.

    Raises:
        ValueError: for a specification that :func:`checked` refuses, or an unknown activation.

    Example::

        >>> import torch
        >>> levels = SpineNet(width=0.1)(torch.rand(2, 3, 100, 200))  # padded to 128x256
        >>> [tuple(level.shape[2:]) for level in levels.values()]
        [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    """

    size_divisible = 2 ** _OUTPUT_LEVELS[-1]

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
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.specification, self.out_channels = checked(specification), out_channels
        self.added_raw = added_raw(self.specification)
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=ACTIVATIONS[activation])
        self.stem = nn.Sequential(conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.ModuleList()
        self.links = nn.ModuleList()
        self.outputs = nn.ModuleDict()
        for row, block in enumerate((*_STEM_BLOCKS, *self.specification), start=-_STEM):
            drop = stochastic_depth * max(0, row + 1) / len(self.specification)
            channels = max(1, int(_WIDTHS[block.level] * width))
            group = _Repeated(conv, block, 64 if row == -_STEM else None, channels, repeats, drop)
            if row >= 0:
                self.links.append(nn.ModuleList(_link(conv, self.blocks[x], group, alpha) for x in block.parents))
            if block.is_output:
                self.outputs[str(block.level)] = conv(group.channels, out_channels, 1)
            self.blocks.append(group)
        self.act = ACTIVATIONS[activation](inplace=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)

    @classmethod
    def of_size(cls, size: str, **kwargs: Any) -> "SpineNet":
        """The published network of a size: 49s, 49, 96, 143 or 190.

        Args:
            size: its name.
            **kwargs: other arguments of the class.

        Raises:
            KeyError: for a size that there is not.

        Example, with torchvision's heads and anchors::

            >>> from retina_fast import RetinaNet
            >>> model = RetinaNet(SpineNet.of_size("49s"), num_classes=3).eval()
            >>> sum(p.numel() for p in model.backbone.parameters())
            9472959
        """
        row = SIZES[size]
        return cls(width=row.width, alpha=row.alpha, repeats=row.repeats, out_channels=row.out_channels, **kwargs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0](self.stem(padded(x, self.size_divisible)))
        numbered = [first, self.blocks[1](first)]
        levels = {}
        for row, block in enumerate(self.specification):
            one, other = (link(numbered[x]) for link, x in zip(self.links[row], block.parents, strict=True))  # type: ignore[arg-type]
            merged = sum((numbered[x] for x in self.added_raw[row]), one + other)
            numbered.append(self.blocks[row + _STEM](self.act(merged)))
            if block.is_output:
                levels[block.level] = self.outputs[str(block.level)](numbered[-1])
        return {f"p{level}": levels[level] for level in _OUTPUT_LEVELS}


class _Repeated(nn.Sequential):
    """One block of a specification, its residual blocks one after the other, all of stride 1."""

    def __init__(self, conv: Any, block: Block, in_channels: int | None, width: int, repeats: int, drop: float) -> None:
        channels = width * _EXPANSION[block.kind]
        inputs = [in_channels or channels, *[channels] * (repeats - 1)]
        super().__init__(*(_Residual(conv, block.kind, x, width, drop) for x in inputs))
        self.level, self.width, self.channels = block.level, width, channels


class _Residual(nn.Module):
    def __init__(self, conv: Any, kind: str, in_channels: int, width: int, drop: float) -> None:
        super().__init__()
        channels = width * _EXPANSION[kind]
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


def _initialise(conv: nn.Conv2d) -> None:
    """Variance 1 / fan-in, by a normal cut at two standard deviations, as the published code draws it."""
    std = 1 / math.sqrt(conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]) / 0.87962566103423978
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)

"""Blocks, joins and pyramids whose fused convs take their sums along; ``fuse.py`` puts them into a model."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork

from retina_fast.backbones.spinenet import Residual, ScalePermuted, SpineNet
from retina_fast.backbones.spinenet_mobile import MobileSpineNet
from retina_fast.deploy.branches import branch
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.fusion.tail import FusedTail


def convs_of(block: BasicBlock | Bottleneck) -> list[Any]:
    """The convs of a block's branch, in order."""
    names = ("conv1", "conv2", "conv3") if isinstance(block, Bottleneck) else ("conv1", "conv2")
    return [getattr(block, name) for name in names]


def _shortcut(block: Any, x: Tensor) -> tuple[Tensor, FusedConv | None]:
    """What the last conv of a block adds for its input x, and the downsampling conv where that runs it, too."""
    if block.merges_downsample:
        return x, block.downsample[0]
    return x if block.downsample is None else block.downsample(x), None


def tails_of(model: nn.Module) -> list[FusedTail]:
    """What runs the ends of a model's bottlenecks, where another one follows."""
    blocks = [module for module in model.modules() if isinstance(module, FusedBottleneck)]
    return [block.tail for block in blocks if block.tail is not None]


class FusedBasicBlock(BasicBlock):
    """torchvision's block, whose last conv adds the identity."""

    may_overwrite = False
    """Whether the identity's memory may be taken by the output."""
    merges_downsample = False
    """Whether the last conv runs the downsampling conv."""

    def forward(self, x: Tensor) -> Tensor:
        z, merged = _shortcut(self, x)
        return self.conv2(self.conv1(x), z, overwrite_z=self.may_overwrite, shortcut=merged)


class FusedBottleneck(Bottleneck):
    """torchvision's block, whose last conv adds the identity."""

    may_overwrite = False
    """Whether the identity's memory may be taken by the output."""
    merges_downsample = False
    """Whether the last conv runs the downsampling conv."""
    tail: FusedTail | None = None
    """What runs all but the first conv, and may run the next block's first with them."""
    before: FusedTail | None = None
    """The tail of the block before, which may have run this block's first conv."""

    def forward(self, x: Tensor) -> Tensor:
        z, merged = _shortcut(self, x)
        y = self.before.take(x) if self.before is not None else None
        y = self.conv1(x) if y is None else y
        if self.tail is not None:
            return self.tail(y, z, self.may_overwrite, merged)
        return self.conv3(self.conv2(y), z, overwrite_z=self.may_overwrite, shortcut=merged)


class FusedResidual(Residual):
    """SpineNet's block, whose last conv adds the shortcut and applies the activation."""

    may_overwrite = False
    """Whether the shortcut's memory may be taken by the output."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        branch: Any = self.branch
        *convs, last, _ = branch
        for conv in convs:
            x = conv(x)
        return last[0](x, shortcut, overwrite_z=self.may_overwrite)


class FusedJoin(ScalePermuted):
    """A scale-permuted network, whose links end in a conv that adds the other link's output."""

    fused_rows: Collection[int] = ()
    """The rows of the specification at which it does."""

    def join(self, row: int, parents: Sequence[Tensor]) -> Tensor:
        """The sum of a row's two parents, each resampled by its link."""
        if row not in self.fused_rows:
            return super().join(row, parents)
        links: Any = self.links[row]
        *steps, last = links[1]
        x = parents[1]
        for step in steps:
            x = step(x)
        return last[0](x, links[0](parents[0]), overwrite_z=True)


class FusedSpineNet(FusedJoin, SpineNet):
    """SpineNet with fused joins."""


class FusedMobileSpineNet(FusedJoin, MobileSpineNet):
    """Mobile SpineNet with fused joins."""


class FusedPyramid(FeaturePyramidNetwork):
    """torchvision's pyramid, whose inner convs add the level above. Where there are side streams, the convs behind them
    run there, all but the finest level's."""

    extends_last_level = False
    """Whether the extra levels are made of the coarsest level alone."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        inner: Any = self.inner_blocks
        convs: list[FusedConv] = [block[0] for block in inner]
        extra: Any = self.extra_blocks

        def coarsest(above: Tensor) -> tuple[list[Tensor], list[str]]:
            results = [self.layer_blocks[-1](above)]
            return extra(results, maps, names) if self.extends_last_level else (results, names)

        above = convs[-1](maps[-1])
        last = branch(partial(coarsest, above))
        levels: list[Callable[[], Tensor]] = []
        for i in range(len(maps) - 2, -1, -1):
            above = convs[i](maps[i], above)
            level = partial(self.layer_blocks[i], above)
            levels.insert(0, branch(level) if i else level)
        results = [level() for level in levels]
        coarse, names = last()
        results += coarse
        if extra is not None and not self.extends_last_level:
            results, names = extra(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))

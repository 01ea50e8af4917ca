"""A score of a specification that needs no training: the entropy of its feature maps, for Gaussian weights.

MAE-DET (Sun et al. 2022, https://arxiv.org/abs/2111.13336) takes a backbone to be the better, the larger the
differential entropy of its maps is for a Gaussian image and weights from N(0, 1), once norms, activations, shortcuts
and squeeze and excitation are taken out. Each conv then multiplies the variance by its fan-in, so that the entropy has
a closed form: for a map of variance s^2 it is 1/2 ln(2 pi e s^2). The score is a weighted sum of it over levels.

The paper's backbones are chains. Here maps also meet: where two links are summed, their variances are, too. Pools and
repeated pixels are taken to leave the variance as it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from retina_fast.backbones.specification import LEARNED, OUTPUT_LEVELS, STEM, Block, added_raw, stem_of
from retina_fast.backbones.spinenet import EXPANSION, FUSION_EPS, WIDTHS, Size
from retina_fast.backbones.spinenet_mobile import MOBILE_EXPANSION, MobileSize, mobile_width

LEVEL_WEIGHTS = {3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0}
"""The paper's weights are 1, 1 and 6 for levels 3, 4 and 5, from the last of which RetinaNet makes 6 and 7 as well.
Here these are levels of their own, and share its 6."""


def entropies(blocks: Sequence[Block], size: Size | MobileSize) -> dict[int, float]:
    """The entropy of each feature map, in nats for a value, by level.

    Args:
        blocks: a checked specification.
        size: widths and depths; a ``MobileSize`` for inverted bottlenecks.

    Example::

        >>> from retina_fast.backbones.specification import SPINENET
        >>> from retina_fast.backbones.spinenet import SIZES
        >>> {level: round(value) for level, value in entropies(SPINENET, SIZES["49"]).items()}
        {3: 150, 4: 152, 5: 171, 6: 191, 7: 191}
    """
    family = _Mobile(size) if isinstance(size, MobileSize) else _SpineNet(size)
    numbered = [*stem_of(blocks), *blocks]
    logs = [family.stem(), 0.0]  # of the variance of each block's output
    logs[1] = logs[0] + family.second()
    found = {}
    for row, (block, raw) in enumerate(zip(blocks, added_raw(blocks), strict=True)):
        factors: Any = block.fusion
        if factors is None or factors == LEARNED:  # learned ones begin alike
            factors = (1.0, 1.0) if factors is None else (1 / (2 + FUSION_EPS),) * 2
        joined = [
            logs[parent] + family.link(numbered[parent], block, side) + 2 * math.log(factors[side])
            for side, parent in enumerate(block.parents)
        ]
        joined += [logs[number] for number in raw]
        largest = max(joined)
        merged = largest + math.log(sum(math.exp(value - largest) for value in joined))
        logs.append(merged + family.block(block))
        if block.is_output:
            variance = logs[row + len(STEM)] + math.log(family.channels(block))
            found[block.level] = (math.log(2 * math.pi * math.e) + variance) / 2
    return {level: found[level] for level in OUTPUT_LEVELS}


def entropy_score(
    blocks: Sequence[Block], size: Size | MobileSize, weights: Mapping[int, float] = LEVEL_WEIGHTS
) -> float:
    """The weighted sum of the entropies of P3 to P7.

    Args:
        blocks: a checked specification.
        size: widths and depths; a ``MobileSize`` for inverted bottlenecks.
        weights: of each level.

    Example::

        >>> from retina_fast.backbones.specification import SPINENET
        >>> from retina_fast.backbones.spinenet import SIZES
        >>> round(entropy_score(SPINENET, SIZES["49"]))
        1407
    """
    return sum(weights[level] * value for level, value in entropies(blocks, size).items())


class _SpineNet:
    """The logarithm by which each part of SpineNet multiplies the variance: the sum of those of its fan-ins."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def width(self, block: Block) -> int:
        return max(1, int(WIDTHS[block.level] * self.size.width))

    def channels(self, block: Block) -> int:
        return self.width(block) * EXPANSION[block.kind]

    def stem(self) -> float:
        first = self.block(STEM[0]) - math.log(self.channels(STEM[0])) + math.log(64)  # its first conv has 64 inputs
        return math.log(3 * 49) + first

    def second(self) -> float:
        return self.block(STEM[1])

    def block(self, block: Block) -> float:
        width = self.width(block)
        fans = (self.channels(block), 9 * width, width) if block.kind == "bottleneck" else (9 * width, 9 * width)
        return self.size.repeats * sum(map(math.log, fans))

    def link(self, source: Block, target: Block, side: int) -> float:
        alpha = target.alphas[side] if target.alphas else self.size.alpha
        narrow = max(1, int(self.width(source) * alpha))
        halved = math.log(9 * narrow) if target.level > source.level else 0.0
        return math.log(self.channels(source)) + halved + math.log(narrow)


class _Mobile:
    """The same of Mobile SpineNet."""

    def __init__(self, size: MobileSize) -> None:
        self.size = size

    def channels(self, block: Block) -> int:
        return mobile_width(block.level, self.size.width)

    def stem(self) -> float:
        return math.log(27) + self._bottleneck(mobile_width(0, self.size.width))

    def second(self) -> float:
        return self._bottleneck(mobile_width(1, self.size.width))

    def block(self, block: Block) -> float:
        return self._bottleneck(self.channels(block))

    def link(self, source: Block, target: Block, side: int) -> float:
        return max(0, target.level - source.level) * math.log(9) + math.log(self.channels(source))

    def _bottleneck(self, inputs: int) -> float:
        return math.log(inputs) + math.log(9) + math.log(inputs * MOBILE_EXPANSION)

"""What a detector of a specification has and computes, counted from its rows, without building the network."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from retina_fast.backbones.specification import LEARNED, MOBILE_KINDS, OUTPUT_LEVELS, STEM, Block, stem_of
from retina_fast.backbones.spinenet import EXPANSION, WIDTHS, Size
from retina_fast.backbones.spinenet_mobile import MOBILE_EXPANSION, MobileSize, mobile_width, squeezed

ANCHORS = 9  # of a cell


class Conv(NamedTuple):
    """One conv of a network, by what it costs."""

    level: int
    """Of its output: it runs on one cell for every 2^level pixels in each direction; -1: on one cell of an image."""
    weights: int
    others: int
    """Its other parameters: bias, or scale and shift of its norms."""


class Cost(NamedTuple):
    """The cost of a detector."""

    parameters: int
    """All are trained."""
    macs: float
    """Multiply-adds of its convs for one image."""


def cost(
    blocks: Sequence[Block], size: Size | MobileSize, num_classes: int = 91, image_size: int | None = None
) -> Cost:
    """Parameters, and multiply-adds for a square image.

    Args:
        blocks: a checked specification.
        size: widths and depths of the detector, of ``SIZES`` or one's own; a ``MobileSize`` for inverted bottlenecks.
        num_classes: K.
        image_size: side of the image in pixels, a multiple of 128; the size's own by default.

    Raises:
        ValueError: if the kind of size is not that of the blocks.

    Example::

        >>> from retina_fast.backbones.specification import SPINENET
        >>> from retina_fast.backbones.spinenet import SIZES
        >>> parameters, macs = cost(SPINENET, SIZES["49"])
        >>> parameters, round(macs / 1e9, 2)
        (28543383, 85.28)
    """
    if isinstance(size, MobileSize) != (blocks[0].kind in MOBILE_KINDS):
        raise ValueError(f"size must be a {'Size' if isinstance(size, MobileSize) else 'MobileSize'}, got {size}")
    side = image_size or size.image_size
    convs = [*(_mobile(blocks, size) if isinstance(size, MobileSize) else _spinenet(blocks, size))]
    heads = [*_heads(size, num_classes)]
    shared = sum(conv.weights + conv.others for conv in heads if conv.level == OUTPUT_LEVELS[0])
    learned = 2 * sum(block.fusion == LEARNED for block in blocks)
    norms = 2 * 2 * (len(OUTPUT_LEVELS) - 1) * size.head_width * size.head_depth  # the first level's are in `shared`
    cells = {level: (side / 2**level) ** 2 for level in range(8)} | {-1: 1}
    return Cost(
        sum(conv.weights + conv.others for conv in convs) + learned + shared + norms,
        sum(conv.weights * cells[conv.level] for conv in (*convs, *heads)),
    )


def _conv(level: int, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> Conv:
    """A conv with a norm."""
    return Conv(level, inputs // groups * outputs * kernel**2, 2 * outputs)


def _spinenet(blocks: Sequence[Block], size: Size) -> Iterator[Conv]:
    def width(block: Block) -> int:
        return max(1, int(WIDTHS[block.level] * size.width))

    def channels(block: Block) -> int:
        return width(block) * EXPANSION[block.kind]

    yield _conv(1, 3, 64, 7)
    if channels(STEM[0]) != 64:
        yield _conv(2, 64, channels(STEM[0]))  # the only shortcut with a conv
    numbered = [*STEM, *blocks]
    for number, block in enumerate(numbered):
        inside = width(block)
        for repeat in range(size.repeats):
            inputs = 64 if number == repeat == 0 else channels(block)
            if block.kind == "bottleneck":
                yield _conv(block.level, inputs, inside)
                yield _conv(block.level, inside, inside, 3)
                yield _conv(block.level, inside, channels(block))
            else:
                yield _conv(block.level, inputs, inside, 3)
                yield _conv(block.level, inside, inside, 3)
        alphas = block.alphas or (size.alpha, size.alpha)
        for parent, alpha in zip(block.parents, alphas, strict=True) if number >= len(STEM) else ():
            source = numbered[parent]
            narrow = max(1, int(width(source) * alpha))
            yield _conv(source.level, channels(source), narrow)
            if block.level > source.level:
                yield _conv(source.level + 1, narrow, narrow, 3)
            yield _conv(block.level, narrow, channels(block))
        if block.is_output:
            yield _conv(block.level, channels(block), size.out_channels)


def _mobile(blocks: Sequence[Block], size: MobileSize) -> Iterator[Conv]:
    stem = stem_of(blocks)
    numbered = [*stem, *blocks]
    yield _conv(1, 3, mobile_width(0, size.width), 3)
    for number, block in enumerate(numbered):
        outputs = mobile_width(block.level, size.width)
        before = block.level if number >= len(stem) else number  # of the input's level, for its width
        inputs = mobile_width(before, size.width)
        inside, inner = inputs * MOBILE_EXPANSION, squeezed(inputs)
        yield _conv(1 if number == 1 else block.level, inputs, inside)  # block 1 has stride 2
        yield _conv(block.level, inside, inside, 3, inside)
        yield Conv(-1, inside * inner, inner)
        yield Conv(-1, inside * inner, inside)
        yield _conv(block.level, inside, outputs)
        for source in (numbered[parent] for parent in block.parents) if number >= len(stem) else ():
            channels = mobile_width(source.level, size.width)
            for level in range(source.level + 1, block.level + 1):
                yield _conv(level, channels, channels, 3, channels)
            yield _conv(block.level, channels, outputs)
        if block.is_output:
            yield _conv(block.level, outputs, size.out_channels)


def _heads(size: Size | MobileSize, num_classes: int) -> Iterator[Conv]:
    """The convs of both heads at every level, whose weights are the same."""

    def conv(level: int, inputs: int, outputs: int, norms: int) -> Iterator[Conv]:
        if isinstance(size, MobileSize):
            yield Conv(level, inputs * 9, 0)
            yield Conv(level, inputs * outputs, outputs + norms)
        else:
            yield Conv(level, inputs * outputs * 9, outputs + norms)

    for level in OUTPUT_LEVELS:
        for channels in (num_classes, 4):
            for depth in range(size.head_depth):
                inputs = size.head_width if depth else size.out_channels
                yield from conv(level, inputs, size.head_width, 2 * size.head_width)
            yield from conv(level, size.head_width, ANCHORS * channels, 0)

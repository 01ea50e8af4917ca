"""What a SpineNet is built from: rows of plain data, one for each block, and the rules that they must obey.

Blocks are numbered as they are built. The stem's two come first, 0 and 1, both at level 2 (level l has stride 2^l), in
the mobile family at 1 and 2. Each row is one more block, at a level of its own choice, fed by two earlier blocks. One
block of each of the levels 3 to 7 is an output.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

LEVELS = range(2, 8)
OUTPUT_LEVELS = range(3, 8)
KINDS = ("bottleneck", "residual")
MOBILE_KINDS = ("mbconv",)
LEARNED = "learned"


class Block(NamedTuple):
    """One row of a specification."""

    level: int
    """2 to 7."""
    kind: str
    """``bottleneck`` (1x1, 3x3, 1x1 to four times the width) or ``residual`` (two 3x3). In the mobile family ``mbconv``
    (1x1 to six times the width, depthwise 3x3, squeeze and excitation, 1x1 back)."""
    parents: tuple[int, int]
    """The numbers of two earlier blocks."""
    is_output: bool = False
    """Whether it is the feature map of its level, 3 to 7."""
    fusion: tuple[float, float] | str | None = None
    """Factors of the two links in their sum; ``learned`` for two that are trained, relu(w) divided by their sum (fast
    normalised fusion, Tan et al. 2020, https://arxiv.org/abs/1911.09070, section 3.3); None, as published, for 1."""
    alphas: tuple[float, float] | None = None
    """Width inside each of the two links, as a part of the width of the block it comes from; None for the network's."""


STEM = (Block(2, "bottleneck", (0, 0)), Block(2, "bottleneck", (0, 0)))  # not fed by links
MOBILE_STEM = (Block(1, "mbconv", (0, 0)), Block(2, "mbconv", (0, 0)))

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
"""The permutation that the paper's search found; all published sizes have these blocks and parents."""

MOBILE_SPINENET = (  # the numbers of the blocks are 2 to 17
    Block(2, "mbconv", (0, 1)),
    Block(2, "mbconv", (1, 2)),
    Block(4, "mbconv", (1, 2)),
    Block(3, "mbconv", (3, 4)),
    Block(4, "mbconv", (3, 5)),
    Block(6, "mbconv", (4, 6)),
    Block(4, "mbconv", (4, 6)),
    Block(5, "mbconv", (7, 8)),
    Block(7, "mbconv", (7, 9)),
    Block(5, "mbconv", (9, 10)),
    Block(5, "mbconv", (9, 11)),
    Block(4, "mbconv", (6, 11), True),
    Block(3, "mbconv", (5, 11), True),
    Block(5, "mbconv", (8, 13), True),
    Block(7, "mbconv", (6, 15), True),
    Block(6, "mbconv", (13, 15), True),
)
"""The permutation of the mobile family (https://arxiv.org/abs/2010.11426)."""


def stem_of(blocks: Sequence[Block]) -> tuple[Block, Block]:
    """The stem of a specification: the mobile family's where its first block is an inverted bottleneck.

    Example::

        >>> [block.level for block in stem_of(MOBILE_SPINENET)]
        [1, 2]
    """
    return MOBILE_STEM if blocks and blocks[0].kind in MOBILE_KINDS else STEM


def checked(specification: Iterable[Sequence[Any]], kinds: Sequence[str] = KINDS) -> tuple[Block, ...]:
    """The rows as blocks.

    Args:
        specification: rows ``(level, kind, (parent, parent), is_output, fusion, alphas)``, of which the last three may
            be left out.
        kinds: of block that there may be.

    Raises:
        ValueError: naming the row (from 0) and the block (from 2), for a row of another form, a level or kind that
            there is not, a parent that is not an earlier block, twice the same parent, an output of level 2, a second
            output of a level, a level without an output, factors or alphas that are not two positive numbers, or a
            block that nothing uses.

    Example::

        >>> checked([*SPINENET[:3], (4, "bottleneck", (2, 7))])
        Traceback (most recent call last):
        ValueError: row 3 (block 5): parent 7 does not come earlier, choose from 0 to 4
    """
    blocks: list[Block] = []
    outputs: dict[int, int] = {}

    def refuse(row: int, problem: str) -> ValueError:
        return ValueError(f"row {row} (block {row + len(STEM)}): {problem}")

    rows = list(specification)
    if not rows:
        raise ValueError("the specification has no row 0: it is empty")
    for row, content in enumerate(rows):
        try:
            level, kind, (a, b), *rest = content
            options: list[Any] = [*rest, *(False, None, None)[len(rest) :]]
            is_output, fusion, alphas = options
        except (TypeError, ValueError):
            form = "(level, kind, (parent, parent), is_output) and perhaps fusion and alphas"
            raise refuse(row, f"must be {form}, got {content!r}") from None
        if type(level) is not int or level not in LEVELS:
            raise refuse(row, f"level must be one of 2 to 7, got {level!r}")
        if kind not in kinds:
            raise refuse(row, f"kind must be {' or '.join(kinds)}, got {kind!r}")
        for parent in (a, b):
            if type(parent) is not int or not 0 <= parent < row + len(STEM):
                raise refuse(row, f"parent {parent!r} does not come earlier, choose from 0 to {row + len(STEM) - 1}")
        if a == b:
            raise refuse(row, f"its parents must be two, got {a} twice")
        if type(is_output) is not bool:
            raise refuse(row, f"is_output must be True or False, got {is_output!r}")
        if is_output and level not in OUTPUT_LEVELS:
            raise refuse(row, f"an output must be of level 3 to 7, got {level}")
        if is_output and level in outputs:
            raise refuse(row, f"row {outputs[level]} is already the output of level {level}")
        if is_output:
            outputs[level] = row
        for name, pair in (("fusion", None if fusion == LEARNED else fusion), ("alphas", alphas)):
            if pair is not None and not _are_two_factors(pair):
                raise refuse(row, f"{name} must be two positive numbers, got {pair!r}")
        if alphas is not None and kind in MOBILE_KINDS:
            raise refuse(row, f"the links of the mobile family have no alphas, got {alphas!r}")
        fusion = fusion if fusion is None or fusion == LEARNED else tuple(fusion)
        blocks.append(Block(level, kind, (a, b), is_output, fusion, alphas and tuple(alphas)))
    for level in OUTPUT_LEVELS:
        if level not in outputs:
            raise ValueError(f"up to row {len(rows) - 1}, the last, no row is an output of level {level}")
    for number in unused(blocks):
        raise refuse(number - len(STEM), "nothing uses it: make it a parent of a later row")
    return tuple(blocks)


def _are_two_factors(pair: object) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    return all(type(x) in (int, float) and 0 < x < math.inf for x in pair)


def added_raw(blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """For each row, the blocks whose outputs are added to its input as they are, without a link.

    Only output blocks have such: the earlier blocks of the same level and kind that are not yet a parent of any block.
    In the published specification this is block 11, whose output is added to the input of block 14.

    Example::

        >>> [(row + 2, blocks) for row, blocks in enumerate(added_raw(SPINENET)) if blocks]
        [(14, (11,))]
    """
    numbered = [*stem_of(blocks), *blocks]
    parents = {0}  # of block 1
    added: list[tuple[int, ...]] = []
    for row, block in enumerate(blocks):
        parents.update(block.parents)
        alike = block.level, block.kind
        earlier = enumerate(numbered[: row + len(STEM)]) if block.is_output else ()
        added.append(tuple(x for x, other in earlier if x not in parents and (other.level, other.kind) == alike))
    return added


def unused(blocks: Sequence[Block]) -> list[int]:
    """The numbers of the blocks that are no output, and whose output no other block takes in.

    Example::

        >>> unused(SPINENET), unused(SPINENET[:10])
        ([], [11])
    """
    used = {parent for block in blocks for parent in block.parents}  # the stem's two are always row 0's parents
    used.update(number for numbers in added_raw(blocks) for number in numbers)
    return [number for number, block in enumerate(blocks, len(STEM)) if not block.is_output and number not in used]


def as_rows(blocks: Iterable[Block]) -> list[list[Any]]:
    """A specification as lists, for a file; fusion and alphas only where there are any.

    Example::

        >>> as_rows(SPINENET[:1])
        [[2, 'bottleneck', [0, 1], False]]
    """
    rows: list[list[Any]] = []
    for block in blocks:
        rows.append([block.level, block.kind, [*block.parents], block.is_output])
        if block.fusion is not None or block.alphas is not None:
            rows[-1] += [[*x] if isinstance(x, tuple) else x for x in (block.fusion, block.alphas)]
    return rows

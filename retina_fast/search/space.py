"""The space that SpineNet was found in (Du et al. 2020, section 3, https://arxiv.org/abs/1912.05027), as numbers.

A specification of the space has intermediate blocks and then five outputs, one of each level 3 to 7. Four things are
chosen: the order of the intermediate blocks and that of the outputs (the scale permutation), two parents of each block,
a shift of each intermediate block's level, and the kind of each block. A point of the space is a dictionary with one
small whole number for each choice. The numbers do not depend on each other, and every combination of them is a valid
specification, so that any optimizer can draw and cross them.

Orders are Lehmer codes: digit i says which of the elements that are left comes next. Parents are the rank of the pair
among all pairs of those blocks that may be chosen. A block that nothing would use takes the place of a parent that is
used elsewhere, since otherwise a part of the network would compute for nothing; the published program lets it.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from retina_fast.backbones.specification import KINDS, LEVELS, MOBILE_KINDS, OUTPUT_LEVELS, STEM, Block, checked, unused

Point = dict[str, int]


def lehmer_decode(digits: Sequence[int]) -> list[int]:
    """The permutation of a Lehmer code, whose last digit, always 0, is left out.

    Example::

        >>> lehmer_decode([2, 0])
        [2, 0, 1]
    """
    left = list(range(len(digits) + 1))
    return [left.pop(digit) for digit in (*digits, 0)]


def lehmer_encode(permutation: Sequence[int]) -> list[int]:
    """The Lehmer code of a permutation of 0 to n - 1, without its last digit.

    Example::

        >>> lehmer_encode([2, 0, 1])
        [2, 0]
    """
    left = list(range(len(permutation)))
    digits = []
    for element in permutation:
        digits.append(left.index(element))
        left.remove(element)
    return digits[:-1]


def pair_of(rank: int) -> tuple[int, int]:
    """The pair a < b with this rank: (0, 1), (0, 2), (1, 2), (0, 3) and so on.

    Example::

        >>> [pair_of(rank) for rank in range(4)]
        [(0, 1), (0, 2), (1, 2), (0, 3)]
    """
    b = (1 + math.isqrt(1 + 8 * rank)) // 2
    return rank - b * (b - 1) // 2, b


def rank_of(a: int, b: int) -> int:
    """The rank of the pair a < b.

    Example::

        >>> rank_of(0, 3)
        3
    """
    return b * (b - 1) // 2 + a


def _with_sorted_parents(block: Block) -> tuple[tuple[int, int], Any, tuple[Any, Any]]:
    """A block's parents in rising order, its fusion, and its alphas in the order of the parents."""
    (a, b), fusion, alphas = block.parents, block.fusion, block.alphas or (None, None)
    if a < b:
        return (a, b), fusion, alphas
    return (b, a), fusion[::-1] if isinstance(fusion, tuple) else fusion, alphas[::-1]


@dataclass(frozen=True)
class Space:
    """A space of specifications.

    Args:
        levels: of the intermediate blocks, before their levels are shifted.
        shifts: of levels, consecutive numbers in rising order. A shifted level stays within 2 to 7.
        kinds: of blocks.
        window: from how many of the blocks before it an intermediate block takes its parents; None: from all. An
            output takes them from all.
        fusions: of the two links of a block, see :class:`retina_fast.backbones.specification.Block`.
        alphas: of each link; None alone for the network's.

    Example::

        >>> from retina_fast.backbones.specification import SPINENET
        >>> point = PAPER.encode(SPINENET)
        >>> PAPER.decode(point) == SPINENET
        True
        >>> f"{PAPER.count:.1e}"
        '1.6e+37'
    """

    levels: tuple[int, ...]
    shifts: tuple[int, ...] = (0,)
    kinds: tuple[str, ...] = KINDS
    window: int | None = None
    fusions: tuple[Any, ...] = (None,)
    alphas: tuple[Any, ...] = (None,)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many values each choice has. Those with one value are left out."""
        middle, blocks = len(self.levels), len(self.levels) + len(OUTPUT_LEVELS)
        sizes = {f"order_{i}": middle - i for i in range(middle)}
        sizes |= {f"output_{i}": len(OUTPUT_LEVELS) - i for i in range(len(OUTPUT_LEVELS))}
        sizes |= {f"shift_{row}": len(self.shifts) for row in range(middle)}
        sizes |= {f"kind_{row}": len(self.kinds) for row in range(blocks)}
        sizes |= {f"parents_{row}": math.comb(row + len(STEM) - self._first(row), 2) for row in range(blocks)}
        sizes |= {f"fusion_{row}": len(self.fusions) for row in range(blocks)}
        sizes |= {f"alpha_{row}_{side}": len(self.alphas) for row in range(blocks) for side in (0, 1)}
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def count(self) -> int:
        """How many points there are."""
        return math.prod(self.sizes.values())

    def sample(self, rng: random.Random) -> Point:
        """A point at random.

        Example::

            >>> len(PAPER.decode(PAPER.sample(random.Random(0))))
            15
        """
        return {name: rng.randrange(size) for name, size in self.sizes.items()}

    def decode(self, point: Mapping[str, int]) -> tuple[Block, ...]:
        """The specification of a point.

        Raises:
            ValueError: naming a choice that is missing or out of range.

        Example::

            >>> [block.level for block in PAPER.decode(dict.fromkeys(PAPER.sizes, 0))][-5:]
            [3, 4, 5, 6, 7]
        """
        for name, size in self.sizes.items():
            if point.get(name) not in range(size):
                raise ValueError(f"{name} must be a whole number from 0 to {size - 1}, got {point.get(name)!r}")
        middle = len(self.levels)
        order = lehmer_decode([point[f"order_{i}"] for i in range(middle - 1)])
        outputs = lehmer_decode([point[f"output_{i}"] for i in range(len(OUTPUT_LEVELS) - 1)])
        blocks = []
        for row in range(middle + len(OUTPUT_LEVELS)):
            if row < middle:
                level = self.levels[order[row]] + self.shifts[point.get(f"shift_{row}", 0)]
                level = min(max(level, LEVELS[0]), LEVELS[-1])
            else:
                level = OUTPUT_LEVELS[outputs[row - middle]]
            first = self._first(row)
            a, b = pair_of(point.get(f"parents_{row}", 0))
            kind = self.kinds[point.get(f"kind_{row}", 0)]
            fusion = self.fusions[point.get(f"fusion_{row}", 0)]
            alphas: Any = tuple(self.alphas[point.get(f"alpha_{row}_{side}", 0)] for side in (0, 1))
            alphas = None if alphas[0] is None else alphas
            blocks.append(Block(level, kind, (first + a, first + b), row >= middle, fusion, alphas))
        return self._with_all_used(blocks)

    def encode(self, specification: Iterable[Sequence[Any]]) -> Point:
        """A point whose specification this is. The order of a block's two parents does not count.

        Raises:
            ValueError: if it is none of the space, saying why.

        Example::

            >>> PUBLIC.encode(PAPER.decode(PAPER.sample(random.Random(0))))
            Traceback (most recent call last):
            ValueError: the space has 11 intermediate blocks and then 5 outputs
        """
        blocks = checked(specification, self.kinds if self.kinds == MOBILE_KINDS else KINDS)
        middle = len(self.levels)
        if [block.is_output for block in blocks] != [False] * middle + [True] * len(OUTPUT_LEVELS):
            raise ValueError(f"the space has {middle} intermediate blocks and then {len(OUTPUT_LEVELS)} outputs")
        # Where any way to shift the space's levels to these exists, that from sorted to sorted does.
        rows = sorted(range(middle), key=lambda row: blocks[row].level)
        places = sorted(range(middle), key=lambda place: self.levels[place])
        place_of = dict(zip(rows, places, strict=True))
        point: Point = {}
        for i, digit in enumerate(lehmer_encode([place_of[row] for row in range(middle)])):
            point[f"order_{i}"] = digit
        for i, digit in enumerate(lehmer_encode([block.level - OUTPUT_LEVELS[0] for block in blocks[middle:]])):
            point[f"output_{i}"] = digit
        for row, block in enumerate(blocks):
            if row < middle:
                shift = block.level - self.levels[place_of[row]]
                if shift not in self.shifts:
                    raise ValueError(f"row {row}: the space has no block that a shift brings to level {block.level}")
                point[f"shift_{row}"] = self.shifts.index(shift)
            if block.kind not in self.kinds:
                raise ValueError(f"row {row}: the space has no block of kind {block.kind}")
            point[f"kind_{row}"] = self.kinds.index(block.kind)
            (a, b), fusion, alphas = _with_sorted_parents(block)
            for side, alpha in enumerate(alphas):
                if alpha not in self.alphas:
                    raise ValueError(f"row {row}: the space has no link of alpha {alpha}")
                point[f"alpha_{row}_{side}"] = self.alphas.index(alpha)
            if fusion not in self.fusions:
                raise ValueError(f"row {row}: the space has no fusion {fusion}")
            point[f"fusion_{row}"] = self.fusions.index(fusion)
            if a < self._first(row):
                raise ValueError(f"row {row}: parent {a} is not among the {self.window} blocks before it")
            point[f"parents_{row}"] = rank_of(a - self._first(row), b - self._first(row))
        return {name: point[name] for name in self.sizes}

    def _first(self, row: int) -> int:
        """The number of the first block that may be a row's parent."""
        if self.window is None or row >= len(self.levels):
            return 0
        return max(0, row + len(STEM) - self.window)

    def _with_all_used(self, blocks: list[Block]) -> tuple[Block, ...]:
        """Each block that nothing uses becomes a parent in the first later row where one can be spared.

        There is always one among the outputs, which have ten parents: were none of them a stem, an output or a parent
        elsewhere, they would be all intermediate blocks.
        """
        uses = Counter(parent for block in blocks for parent in block.parents)

        def spare(parent: int) -> bool:
            return parent < len(STEM) or uses[parent] > 1 or blocks[parent - len(STEM)].is_output

        for number in unused(blocks):
            later = (row for row in range(number - len(STEM) + 1, len(blocks)) if number >= self._first(row))
            row, side = next((row, side) for row in later for side in (0, 1) if spare(blocks[row].parents[side]))
            kept, lost = blocks[row].parents[1 - side], blocks[row].parents[side]
            uses[lost] -= 1
            uses[number] += 1
            blocks[row] = blocks[row]._replace(parents=(min(kept, number), max(kept, number)))
        return tuple(blocks)


PAPER = Space((2, 3, 3, 3, 4, 4, 4, 4, 4, 5), (-1, 0, 1, 2), window=5)
"""That in which SpineNet-49 was found: the blocks of ResNet-50, one of level 5 of which became the outputs 6 and 7."""

PUBLIC = Space((2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5), (-1, 0, 1, 2), window=4)
"""That of Google's later program (``spinenet`` of https://github.com/google/vertex-ai-nas): one block more."""

MOBILE = Space((2, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5), (-1, 0, 1, 2), MOBILE_KINDS, 4)
"""That program's space of inverted bottlenecks (``spinenet_mbconv``), which holds the published mobile permutation."""

SPACES = {"paper": PAPER, "public": PUBLIC, "mobile": MOBILE}

"""Tuple arguments of a Triton kernel: one entry a level, sizes among them as odd negative numbers.

Triton specialises each integer of a tuple on being 1 or a multiple of 16, whatever do_not_specialize says, and would
compile again for nearly every image size. Odd negative numbers are neither.
"""

from collections.abc import Sequence

from retina_fast.kernels.compiler import tl, triton


def codes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as a kernel's tuple argument takes them."""
    return tuple(-1 - 2 * size for size in sizes)


@triton.jit
def size(code):
    """A size of such a tuple, within a kernel."""
    return (-1 - code) // 2


@triton.jit
def pick(entries, level):
    """The entry of a level, known when the kernel runs, from a tuple: a pointer or a code."""
    entry = entries[0]
    for i in tl.static_range(1, len(entries)):
        if level == i:
            entry = entries[i]
    return entry


@triton.jit
def level_of(first_tiles, tile):
    """The level that holds a tile, of tiles counted through the levels; codes of each level's first, and of the end."""
    level = 0
    for i in tl.static_range(1, len(first_tiles) - 1):
        if tile >= size(first_tiles[i]):
            level = i
    return level

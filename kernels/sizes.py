"""Sizes within a tuple argument of a Triton kernel, as odd negative numbers.

Triton specialises each integer of a tuple on being 1 or a multiple of 16, whatever do_not_specialize says, and would
compile again for nearly every image size. Odd negative numbers are neither.
"""

from collections.abc import Sequence

from retina_fast.kernels.compiler import tl, triton  # noqa: F401  the interpreter wants tl beside a jit function


def codes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as a kernel's tuple argument takes them."""
    return tuple(-1 - 2 * size for size in sizes)


@triton.jit
def size(code):
    """A size of such a tuple, within a kernel."""
    return (-1 - code) // 2

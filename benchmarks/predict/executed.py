"""Counts what kernels execute beside their usual path, by running their compiled code on a CPU.

The machine code shows how long each path is, but not how often it is taken. `tests.ptx.counts` executes the kernels;
the ratios of its counts, which are of PTX, are taken to hold for the machine code as well.
"""

import functools

import torch

from tests.ptx.counts import COUNTS, count


@functools.cache
def instructions_an_element(name: str, kernel: str) -> float:
    """Returns the instructions that all launches of a kernel execute for an element, in a case of
    `tests.ptx.counts`."""
    return sum(each for result, each in count(name) if result.name == kernel)


def mixed_over_background(dtype: torch.dtype) -> float:
    """Returns how many times the instructions of a background tile a mixed tile of the focal loss executes."""
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    background, mixed = (f"focal_loss {short} K=91 {kind} tiles" for kind in ("background", "mixed"))
    assert {background, mixed} <= COUNTS.keys()
    kernel = "_focal_loss_kernel"
    return instructions_an_element(mixed, kernel) / instructions_an_element(background, kernel)

"""The interpreter as the tests have it: see ``tests/instruments/interpreter.py``."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from retina_fast.kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the order in which a GPU combines is its own")


@triton.jit
def _later(value, index, other, other_index):
    """Neither symmetric nor associative: any other order gives something else."""
    return value * 0.5 + other, tl.where(value > other, index, other_index)


@triton.jit
def _halves(value, other):
    return value * 0.5 + other


@triton.jit
def _larger(value, other):
    return value if value > other else other


@triton.jit
def _largest(values, out, A: tl.constexpr, B: tl.constexpr):
    b = tl.arange(0, B)
    tl.store(out + b, tl.reduce(tl.load(values + tl.arange(0, A)[:, None] * B + b[None, :]), 0, _larger))


def test_own_functions_may_branch():
    values, out = torch.randn(4, 8), torch.empty(8)
    _largest[(1,)](values, out, 4, 8)
    assert torch.equal(out, values.amax(dim=0))


@triton.jit
def _kernel(
    values, indices, reduced, reduced_index, scanned, whole, AXIS: tl.constexpr, REVERSE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    a, b, c = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    cells = (a * B + b) * C + c
    x, i = tl.load(values + cells), tl.load(indices + cells)
    y, j = tl.reduce((x, i), AXIS, _later, keep_dims=True)
    zero = tl.zeros([A, B, C], tl.int32)
    tl.store(reduced + cells, y + zero)
    tl.store(reduced_index + cells, j + zero)
    z, _ = tl.associative_scan((x, i), AXIS, _later, reverse=REVERSE)
    tl.store(scanned + cells, z)
    tl.store(whole, tl.reduce(x, None, _halves))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 8, 2), (1, 4, 1), (8, 1, 4), (1, 1, 1)])
def test_own_functions_combine_from_first_to_last(shape, axis, reverse):
    values, indices = torch.randn(shape), torch.randint(100, shape, dtype=torch.int32)
    reduced, scanned, whole = torch.empty(shape), torch.empty(shape), torch.empty(1)
    reduced_index = torch.empty(shape, dtype=torch.int32)
    _kernel[(1,)](values, indices, reduced, reduced_index, scanned, whole, axis, reverse, *shape)

    def running(values, indices):
        value, index = values[0], indices[0]
        found = [value]
        for at in range(1, len(values)):
            index = torch.where(value > values[at], index, indices[at])
            value = value * 0.5 + values[at]
            found.append(value)
        return found, index

    found, index = running(values.unbind(axis), indices.unbind(axis))
    assert torch.equal(reduced, found[-1].unsqueeze(axis).expand(shape))
    assert torch.equal(reduced_index, index.unsqueeze(axis).expand(shape))
    if reverse:
        found = running(values.flip(axis).unbind(axis), indices.flip(axis).unbind(axis))[0][::-1]
    assert torch.equal(scanned, torch.stack(found, axis))
    assert whole.item() == running(values.flatten(), indices.flatten())[0][-1].item()

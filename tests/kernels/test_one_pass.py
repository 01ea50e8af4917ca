"""Losses whose gradient is finished in forward: scaling it in place, and the autograd function around it."""

import pytest
import torch

from retina_fast.kernels import one_pass as module
from retina_fast.kernels.one_pass import OnePass, scale_op
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles for each program."""
    monkeypatch.setattr(module, "_TILE", 512)
    monkeypatch.setattr(module, "_PROGRAMS", 3)


def squares(levels):
    """A loss with its finished gradient: the sum of squares."""
    return [sum(level.square().sum() for level in levels), *(2 * level for level in levels)]


def case(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(device, dtype).requires_grad_() for n in (7, 600)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0, float("nan")])
def test_scaling_in_place(factor, dtype, device):
    """Tensors of one element, of a part of a tile, of whole tiles, and of several for each program."""
    tensors = [torch.randn(n, device=device).to(dtype) for n in (1, 37, 512, 2048, 5000)]
    expected = [tensor * factor for tensor in tensors]
    scale_op(tensors, torch.tensor(factor, device=device))
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_writes_nothing(device):
    """A signalling NaN would come back quiet, with other bits, if it were multiplied."""
    bits = torch.full((600,), 0x7F800001, dtype=torch.int32, device=device)
    scale_op([bits.view(torch.float32)], torch.tensor(1.0, device=device))
    assert (bits == 0x7F800001).all()


def cubes_instead(*levels):
    """A reference that can be told from the function itself."""
    return torch.stack([(level**3).sum() for level in levels]).sum()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients(factor, device):
    levels = case(device)
    grads = torch.autograd.grad(OnePass.apply("squares", squares, cubes_instead, *levels) * factor, levels)
    for grad, level in zip(grads, levels, strict=True):
        torch.testing.assert_close(grad, 2 * factor * level.detach(), rtol=1e-6, atol=0)


def test_backward_twice(device):
    """What a user does to the first gradients must not reach the second."""
    levels = case(device)
    loss = OnePass.apply("squares", squares, cubes_instead, *levels)
    for grad in torch.autograd.grad(loss * 5, levels, retain_graph=True):
        grad.mul_(100)
    for grad, level in zip(torch.autograd.grad(loss * 3, levels), levels, strict=True):
        torch.testing.assert_close(grad, 6 * level.detach(), rtol=1e-6, atol=0)


def test_second_derivatives_are_the_references_and_warned_of(device):
    levels = case(device)
    assert_differentiable_twice(
        "squares",
        (lambda: OnePass.apply("squares", squares, cubes_instead, *levels) * 3, lambda: cubes_instead(*levels) * 3),
        levels,
        1e-6,
    )


def test_opcheck(device):
    levels = [level.detach() for level in case(device)]
    torch.library.opcheck(scale_op, (levels, torch.tensor(3.0, device=device)))


# As compiled code


@pytest.mark.parametrize("name", names("one_pass"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("one_pass"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

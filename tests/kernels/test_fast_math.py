"""The special functions of the losses against float64, within the bounds that fast_math.py states."""

import pytest
import torch

from retina_fast.kernels import fast_math
from retina_fast.kernels.dispatch import INTERPRETED, PTX, tl, triton

pytest.importorskip("triton")

N = 4096


@triton.jit
def _unary(x_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if NAME == "exp2":
        y = fast_math.exp2(x, PTX)
    elif NAME == "reciprocal":
        y = fast_math.reciprocal(x, PTX)
    elif NAME == "log2":
        y = fast_math.log2(x, PTX)
    else:
        y = fast_math.atan(x)
    tl.store(out_ptr + tl.arange(0, N), y)


@triton.jit
def _sigmoid(x_ptr, p_ptr, log1p_ptr, N: tl.constexpr, PTX: tl.constexpr):
    i = tl.arange(0, N)
    p, log1p = fast_math.sigmoid(tl.load(x_ptr + i), PTX)
    tl.store(p_ptr + i, p)
    tl.store(log1p_ptr + i, log1p)


def unary(name, x):
    out = torch.empty_like(x)
    _unary[(1,)](x, out, NAME=name, N=len(x), PTX=PTX)
    return out.cpu().double()


def sigmoid(x):
    p, log1p = torch.empty_like(x), torch.empty_like(x)
    _sigmoid[(1,)](x, p, log1p, N=len(x), PTX=PTX)
    return p.cpu().double(), log1p.cpu().double()


def relative(ours, exact):
    return ((ours - exact).abs() / exact.abs()).max().item()


def test_exp2(device):
    x = torch.linspace(-126, 127, N, device=device)
    assert relative(unary("exp2", x), torch.exp2(x.cpu().double())) <= 2**-22


def test_reciprocal(device):
    x = torch.logspace(-37, 37, N, dtype=torch.float64).float().to(device)
    assert relative(unary("reciprocal", x), 1 / x.cpu().double()) <= 2**-23
    assert relative(unary("reciprocal", -x), -1 / x.cpu().double()) <= 2**-23


def test_log2(device):
    """Absolute between 1/2 and 2, relative elsewhere; a float32 result adds its own rounding."""
    x = torch.logspace(-37, 37, N, dtype=torch.float64).float().to(device)
    ours, exact = unary("log2", x), torch.log2(x.cpu().double())
    near = (x.cpu() > 0.5) & (x.cpu() < 2)
    assert near.any()
    assert (ours - exact)[near].abs().max() <= 2**-22
    assert relative(ours[~near], exact[~near]) <= 2**-22


def test_sigmoid_and_softplus(device):
    x = torch.linspace(-80, 80, N, device=device)
    exact = x.cpu().double()
    p, log1p = sigmoid(x)
    # 2^-22 of ex2, 2^-23 of rcp, and what log2(e) and its product with x are rounded by, which ex2 magnifies by |x|
    tolerance = 2**-21 + 2**-23 * exact.abs()
    assert ((p - torch.sigmoid(exact)).abs() <= tolerance * torch.sigmoid(exact)).all()
    # the polynomial's 1e-6 and float32's rounding; above 0 also that of 1 - p, which is absolute
    expected = torch.log1p(torch.exp(-exact.abs()))
    tolerance = (1e-6 + 2**-22 + tolerance) * expected + torch.where(exact > 0, 2**-23, 0)
    assert ((log1p - expected).abs() <= tolerance).all()


def test_sigmoid_of_special_numbers(device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=device)
    p, log1p = sigmoid(x)
    assert p[0].isnan()
    assert log1p[0].isnan()
    assert p[1:].tolist() == [1.0, 0.0, 0.5]
    assert log1p[1:3].tolist() == [0.0, 0.0]
    assert abs(log1p[3].item() - 0.6931471805599453) <= 1e-6


def test_arc_tangent(device):
    x = torch.logspace(-8, 8, N, dtype=torch.float64).float().to(device)
    assert relative(unary("atan", x), torch.atan(x.cpu().double())) <= (3e-7 if INTERPRETED else 5e-7)

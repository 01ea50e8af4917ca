"""The focal loss of dense targets against torchvision's in float64."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss as reference

from retina_fast.kernels import sigmoid_focal_loss as module
from retina_fast.kernels.sigmoid_focal_loss import _sigmoid_focal_loss_triton, sigmoid_focal_loss
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names


def case(device, dtype=torch.float32, soft=False, shape=(5, 7, 131)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 4
    targets = torch.rand(shape, generator=generator)
    if not soft:
        targets = (targets < 0.1).float()
    return x.to(device, dtype).requires_grad_(), targets.to(device, dtype)


def error(ours, theirs):
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def exact(x, targets, *args):
    x = x.detach().cpu().double().requires_grad_()
    return x, reference(x, targets.cpu().double(), *args)


# Matches the reference


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 2), (0.5, 0), (0.25, 1.5), (0.25, 0.5)])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_float32_is_within_1e_5_of_float64(soft, alpha, gamma, reduction, device):
    x, targets = case(device, soft=soft)
    doubles, expected = exact(x, targets, alpha, gamma, reduction)
    loss = _sigmoid_focal_loss_triton(x, targets, alpha, gamma, reduction)
    assert loss.shape == expected.shape
    assert error(loss, expected) < 1e-5
    incoming = torch.rand(expected.shape, dtype=torch.float64)
    grad = torch.autograd.grad(loss, x, incoming.to(device, loss.dtype))
    assert error(grad[0], torch.autograd.grad(expected, doubles, incoming)[0]) < 1e-5


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_eager_error(dtype, reduction, device):
    x, targets = case(device, dtype)
    doubles, expected = exact(x, targets, 0.25, 2, reduction)
    eager = reference(x, targets, 0.25, 2, reduction)
    loss = _sigmoid_focal_loss_triton(x, targets, 0.25, 2, reduction)
    assert loss.dtype == eager.dtype
    assert error(loss, expected) <= max(2 * error(eager, expected), torch.finfo(dtype).eps)
    ours, theirs, doubled = (
        torch.autograd.grad(y.sum(), at)[0] for y, at in ((loss, x), (eager, x), (expected, doubles))
    )
    assert error(ours, doubled) <= 2 * error(theirs, doubled)


# Gradients


def test_an_expanded_gradient_is_read_as_one_number(device):
    x, targets = case(device)
    losses = _sigmoid_focal_loss_triton(x, targets, 0.25, 2, "none")
    (grad,) = torch.autograd.grad(losses.mean(), x, retain_graph=True)
    assert error(grad * 2, torch.autograd.grad(losses.mean() * 2, x)[0]) < 1e-6


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_derivatives(device, reduction):
    x, targets = case(device)
    functions = _sigmoid_focal_loss_triton, reference
    losses = [lambda f=f: f(x, targets, 0.25, 2, reduction).square().sum() for f in functions]
    assert_differentiable_twice("sigmoid_focal_loss", losses, [x], 1e-4)


# Edges


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2048,), (2049,)])
def test_sizes(shape, device):
    x, targets = case(device, shape=shape)
    torch.testing.assert_close(
        _sigmoid_focal_loss_triton(x, targets, 0.25, 2, "none"), reference(x, targets), rtol=1e-5, atol=1e-8
    )
    total = _sigmoid_focal_loss_triton(x, targets, 0.25, 2, "sum")
    torch.testing.assert_close(total, reference(x, targets, reduction="sum"), rtol=1e-5, atol=1e-8)


def test_logits_of_80_and_nan(device):
    x = torch.tensor([80.0, 80.0, -80.0, -80.0, torch.nan], device=device, requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], device=device)
    losses = _sigmoid_focal_loss_triton(x, targets, 0.25, 2, "none")
    doubles, expected = exact(x, targets)
    torch.testing.assert_close(losses.cpu(), expected.float(), rtol=1e-5, atol=1e-30, equal_nan=True)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    (grads,) = torch.autograd.grad(expected.sum(), doubles)
    torch.testing.assert_close(grad.cpu(), grads.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("arguments", [{"alpha": 1.5}, {"alpha": -0.5}, {"reduction": "max"}])
def test_errors_are_torchvisions(arguments, device):
    x, targets = case(device)
    with pytest.raises(ValueError, match="Invalid") as theirs:
        reference(x, targets, **arguments)
    with pytest.raises(ValueError, match="Invalid") as ours:
        sigmoid_focal_loss(x, targets, **arguments)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="Target size"):
        sigmoid_focal_loss(x, targets[0])


@pytest.mark.parametrize("inputs", [[0.5], torch.ones(1).numpy(), None])
def test_what_is_no_tensor_gets_torchvisions_error(inputs):
    with pytest.raises(TypeError) as theirs:
        reference(inputs, torch.ones(1))
    with pytest.raises(TypeError) as ours:
        sigmoid_focal_loss(inputs, torch.ones(1))
    assert str(ours.value) == str(theirs.value)


def test_gradients_of_the_targets_and_float64_take_torchvisions_way(device):
    x, targets = case(device)
    (grad,) = torch.autograd.grad(sigmoid_focal_loss(x, targets.requires_grad_()).sum(), targets)
    assert grad.isfinite().all()
    assert sigmoid_focal_loss(x.double(), targets.double()).dtype == torch.float64


# Registration


@pytest.mark.parametrize("output", ["losses", "sums"])
def test_opcheck(output, device):
    x, targets = case(device, shape=(37,))
    torch.library.opcheck(module._op, (x, targets, None, 0.25, 2.0, output, torch.float32))


def test_compiles_whole(device):
    x, targets = case(device, shape=(3, 37))
    compiled = torch.compile(_sigmoid_focal_loss_triton, fullgraph=True, backend="aot_eager")
    loss = compiled(x, targets, 0.25, 2.0, "mean")
    doubles, expected = exact(x, targets, 0.25, 2, "mean")
    assert error(loss, expected) < 1e-5
    assert error(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, doubles)[0]) < 1e-5


def test_autocast_returns_float32_as_torchvision_does_on_a_gpu(device):
    x, targets = case(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert _sigmoid_focal_loss_triton(x, targets, 0.25, 2, "sum").dtype == torch.float32


# As compiled code


@pytest.mark.parametrize("name", names("sigmoid_focal_loss"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("sigmoid_focal_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

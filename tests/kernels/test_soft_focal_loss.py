"""Quality focal loss and varifocal loss: the kernels and the CPU path against the papers' formulas in float64."""

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast.kernels import soft_focal_loss as module
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.soft_focal_loss import soft_focal_loss, soft_focal_loss_reference
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.kernels.focal_cases import case as focal_case
from tests.kernels.focal_cases import error
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names

LOSS_TYPES = ("quality_focal", "varifocal")


def kernel_loss(*arguments):
    """The loss by the kernel, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return soft_focal_loss(*arguments)


@pytest.fixture
def loss_fn(path):
    return kernel_loss if path == "kernel" else soft_focal_loss


def case(k, device="cpu", dtype=torch.float32, foreground=0.1, **options):
    """Levels, labels, qualities and normalizers. Qualities are 0 and 1, too."""
    logits, labels, normalizers = focal_case(k, device, dtype, foreground=foreground, **options)
    quality = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1)
    return logits, labels, quality.to(device), normalizers


def paper(logits, labels, quality, normalizers, k, loss_type, gamma):
    """Equation 2 of either paper, element by element, in float64."""
    x = torch.cat(flatten_all(logits, k), dim=1)
    p = torch.sigmoid(x)
    y = torch.zeros_like(x)
    for b, n in (labels >= 0).nonzero().tolist():
        y[b, n, labels[b, n]] = quality[b, n]
    if loss_type == "quality_focal":
        losses = -((y - p).abs() ** gamma) * ((1 - y) * torch.log(1 - p) + y * torch.log(p))
    else:
        positive = -y * (y * torch.log(p) + (1 - y) * torch.log(1 - p))
        losses = torch.where(y > 0, positive, -0.75 * p**gamma * torch.log(1 - p))
    losses = losses[labels != -2]
    image = torch.arange(len(labels))[:, None].expand_as(labels)[labels != -2]
    return (losses.sum(dim=1) / normalizers[image]).sum()


def exact(inputs, k, loss_type, gamma=2.0, factor=1.0):
    logits, labels, quality, normalizers = inputs
    doubles = [level.detach().cpu().double().requires_grad_() for level in logits]
    loss = paper(doubles, labels.cpu(), quality.cpu().double(), normalizers.cpu().double(), k, loss_type, gamma)
    return loss.detach(), torch.autograd.grad(loss * factor, doubles)


def loss_and_grads(function, inputs, k, loss_type, gamma=2.0, factor=1.0):
    loss = function(*inputs, k, loss_type, gamma)
    return loss.detach(), torch.autograd.grad(loss * factor, inputs[0])


# Matches the papers


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_definition_is_the_papers(k, loss_type):
    inputs = case(k)
    for gamma in (1.0, 1.5, 2.0):
        loss, grads = loss_and_grads(soft_focal_loss_reference, inputs, k, loss_type, gamma)
        expected, expected_grads = exact(inputs, k, loss_type, gamma)
        assert error(loss, expected) < 1e-5
        assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize(
    ("loss_type", "gamma", "k"),
    [("quality_focal", 2.0, 7), ("quality_focal", 1.5, 1), ("quality_focal", 1.0, 7), ("varifocal", 2.0, 7),
     ("varifocal", 1.5, 1)],
)  # fmt: skip
def test_float32_is_within_1e_5_of_float64(loss_type, gamma, k, loss_fn, place, small_tiles):
    inputs = case(k, place)
    loss, grads = loss_and_grads(loss_fn, inputs, k, loss_type, gamma, factor=3.0)
    expected, expected_grads = exact(inputs, k, loss_type, gamma, factor=3.0)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_is_rounded_once(loss_type, dtype, limit, loss_fn, place, small_tiles):
    inputs = case(7, place, dtype)
    loss, grads = loss_and_grads(loss_fn, inputs, 7, loss_type, factor=64.0)
    expected, expected_grads = exact(inputs, 7, loss_type, factor=64.0)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < limit


def test_levels_in_nchw_memory(loss_fn, place, small_tiles):
    logits, *rest = case(7, place)
    logits = [level.detach().contiguous().requires_grad_() for level in logits]
    loss, grads = loss_and_grads(loss_fn, (logits, *rest), 7, "varifocal")
    expected, expected_grads = exact((logits, *rest), 7, "varifocal")
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


# Edges


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    ("foreground", "ignored"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)], ids=["none", "ignored", "all"]
)
def test_no_foreground_all_ignored_all_foreground(loss_type, foreground, ignored, loss_fn, place, small_tiles):
    inputs = case(1, place, foreground=foreground, ignored=ignored)
    loss, grads = loss_and_grads(loss_fn, inputs, 1, loss_type)
    if ignored:
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)
    else:
        expected, expected_grads = exact(inputs, 1, loss_type)
        assert error(loss, expected) < 1e-5
        assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_score_that_is_its_target_has_no_slope(loss_type, loss_fn, place):
    logits, labels = [torch.zeros(1, 1, 3, device=place).requires_grad_()], torch.tensor([[1]], device=place)
    inputs = logits, labels, torch.tensor([[0.5]], device=place), torch.ones(1, device=place)
    _, (grad,) = loss_and_grads(loss_fn, inputs, 3, loss_type)
    assert grad[0, 0, 1] == 0
    assert (grad[0, 0, ::2] > 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_logits_of_40(loss_type, loss_fn, place, small_tiles):
    """Whose score rounds to 0 or 1."""
    logits, labels, quality, normalizers = case(7, place, foreground=0.5)
    logits = [(level.detach().sign() * 40).requires_grad_() for level in logits]
    loss, grads = loss_and_grads(loss_fn, (logits, labels, quality, normalizers), 7, loss_type)
    doubles = [level.detach().cpu().double().requires_grad_() for level in logits]
    rest = labels.cpu(), quality.cpu().double(), normalizers.cpu().double()
    expected, expected_grads = loss_and_grads(soft_focal_loss_reference, (doubles, *rest), 7, loss_type)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("of", ["logit", "quality"])
def test_nan_surfaces_but_not_from_ignored_anchors(loss_type, of, loss_fn, place, small_tiles):
    logits, labels, quality, normalizers = case(7, place, foreground=0.0, ignored=0.0)
    labels[1, 50] = 3
    if of == "quality":
        quality[1, 50] = torch.nan
    else:
        poisoned = logits[0].detach().clone()
        poisoned.permute(0, 2, 3, 1).view(2, -1, 7)[1, 50, 3] = torch.nan
        logits[0] = poisoned.requires_grad_()
    loss, grads = loss_and_grads(loss_fn, (logits, labels, quality, normalizers), 7, loss_type)
    assert loss.isnan()
    assert grads[0].isnan().sum() == 1
    labels[1, 50] = -2
    loss, _ = loss_and_grads(loss_fn, (logits, labels, quality, normalizers), 7, loss_type)
    assert loss.isfinite()


def test_no_image(loss_fn, place):
    inputs = (
        [torch.empty(0, 9, 7, device=place)],
        torch.empty(0, 9, device=place).int(),
        torch.empty(0, 9, device=place),
    )
    assert loss_fn(*inputs, torch.empty(0, device=place), 7) == 0


def test_no_gradient_flows_into_the_quality(loss_fn, place, small_tiles):
    logits, labels, quality, normalizers = case(7, place)
    quality.requires_grad_()
    loss_fn(logits, labels, quality, normalizers, 7, "quality_focal").backward()
    assert quality.grad is None
    assert logits[0].grad is not None


@pytest.mark.parametrize("loss_type", ["quality_focal", pytest.param("varifocal", marks=pytest.mark.slow)])
def test_second_derivatives(loss_type, loss_fn, place, small_tiles):
    inputs = case(7, place)
    both: Any = loss_fn, soft_focal_loss_reference
    losses = [functools.partial(function, *inputs, 7, loss_type) for function in both]
    assert_differentiable_twice("soft_focal_loss", losses, inputs[0], 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 5)}, r"labels must be .* = \(2, 123\), got \(2, 5\)"),
        ({2: torch.zeros(2, 5)}, r"quality must be .* = \(2, 123\), got \(2, 5\)"),
        ({5: "focal"}, "loss_type must be one of quality_focal, varifocal, got 'focal'"),
        ({6: 0.5}, r"gamma must be at least 1, got 0\.5"),
    ],
)
def test_bad_arguments(change, message):
    arguments: list[Any] = [*case(7), 7, "varifocal", 2.0]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        soft_focal_loss(*arguments)


# Registration


@pytest.mark.parametrize(
    ("loss_type", "outputs"),
    [
        ("quality_focal", (True, True)),
        pytest.param("varifocal", (True, False), marks=pytest.mark.slow),
        pytest.param("varifocal", (False, True), marks=pytest.mark.slow),
    ],
)
def test_opcheck(device, loss_type, outputs):
    logits, *tensors = case(3, device, shapes=((2, 3), (1, 1)))
    levels = [level.contiguous() for level in flatten_all(logits, 3)]
    if outputs != (True, False):
        levels = [level.detach() for level in levels]
    factor = None if outputs[0] else torch.tensor(0.5, device=device)
    arguments = levels, *tensors, factor, 3, loss_type, 2.0, *outputs
    torch.library.opcheck(module._soft_focal_loss_op, arguments)


@pytest.mark.slow
def test_fullgraph_compile(device, monkeypatch):
    inputs = case(3, device, shapes=((2, 3), (1, 1)))
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    compiled: Any = torch.compile(soft_focal_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs, 3, "varifocal")
    expected = kernel_loss(*inputs, 3, "varifocal")
    assert loss == expected
    grads, expected_grads = (torch.autograd.grad(value, inputs[0]) for value in (loss, expected))
    assert error(grads, expected_grads) < 1e-7


def test_one_launch_and_one_to_sum():
    launches = launches_of(KERNEL_CALLS["soft_focal_loss bf16 varifocal"].run)
    assert [launch.kernel.__name__ for launch in launches] == ["_focal_loss_kernel", "_sum_kernel"]


# As compiled code


@pytest.mark.parametrize(
    "name",
    [name if "bf16" in name else pytest.param(name, marks=pytest.mark.slow) for name in names("soft_focal_loss")],
)
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("soft_focal_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

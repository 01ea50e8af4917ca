"""Box loss, by the reference and by the kernel, against torchvision's in float64, loss and gradient."""

from typing import Any
from unittest import mock

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, _box_loss

from retina_fast.kernels import box_loss as module
from retina_fast.kernels.box_loss import LOSS_TYPES, box_loss, box_loss_reference
from retina_fast.kernels.levels import flatten_all
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names


def kernel_loss(deltas, *arguments):
    """The loss by the kernel, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return box_loss(deltas, *arguments)


@pytest.fixture(params=["reference", "kernel"])
def path(request):
    return request.param


@pytest.fixture
def loss_fn(path):
    return kernel_loss if path == "kernel" else box_loss_reference


@pytest.fixture
def place(path, device):
    return device if path == "kernel" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned_small_tiles(monkeypatch):
    """Several tiles a level; what a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(module, "_TILE", 32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(dtype, channels_last=True, device="cpu"):
    """Levels of 3 images, of which the second has no ground truth; anchors, matches, ground truths."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    deltas = [torch.randn(3, 3 * 4, h, w, generator=generator) * 0.7 for h, w in ((7, 5), (3, 2))]
    deltas = [level.to(device, dtype).contiguous(memory_format=layout).requires_grad_() for level in deltas]
    n = 3 * (35 + 6)
    corner = torch.rand(n, 2, generator=generator) * 50
    anchors = torch.cat((corner, corner + 5 + 30 * torch.rand(n, 2, generator=generator)), dim=1)
    counts = [4, 0, 2]
    boxes = anchors[torch.randint(0, n, (sum(counts),), generator=generator)] + torch.tensor([-2.0, -1.0, 3.0, 2.0])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.stack([torch.randint(-2, max(count, 1), (n,), generator=generator) for count in counts])
    indices[1] = indices[1].clamp(max=-1)
    indices[0, -20:] = -1  # a tile without foreground
    rest = anchors, indices.int(), boxes, offsets, torch.tensor([6.0, 3.0, 9.0])
    return deltas, *(tensor.to(device) for tensor in rest)


def torchvision_loss(deltas, anchors, indices, boxes, offsets, normalizers, loss_type):
    flat = torch.cat([level.permute(0, 2, 3, 1).reshape(3, -1, 4) for level in deltas], dim=1).double()
    coder, total = BoxCoder((1.0, 1.0, 1.0, 1.0)), 0
    for b in range(3):
        foreground = indices[b] >= 0
        truths = boxes[offsets[b] : offsets[b + 1]][indices[b][foreground].long()].double()
        total += _box_loss(loss_type, coder, anchors[foreground].double(), truths, flat[b][foreground]) / normalizers[b]
    return total


def assert_close(grads, expected, tolerance):
    for grad, exact in zip(grads, expected, strict=True):
        assert (grad.double() - exact.double()).norm() <= tolerance * exact.double().norm()


# Rounded once, as the expected gradient is; the interpreter truncates to bfloat16, by a unit in the last place.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "channels_last"),
    [
        (torch.float32, 1e-5, True),
        (torch.float32, 1e-5, False),
        (torch.bfloat16, 2**-7, True),
        (torch.float16, 2**-10, False),
    ],
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_matches_torchvision_in_float64(loss_fn, place, loss_type, dtype, tolerance, channels_last):
    arguments = (*case(dtype, channels_last, place), loss_type)
    deltas, ours, theirs = arguments[0], loss_fn(*arguments), torchvision_loss(*arguments)
    assert ours.dtype == torch.float32
    assert abs(ours - theirs) <= 1e-5 * abs(theirs)
    assert_close(torch.autograd.grad(ours, deltas), torch.autograd.grad(theirs, deltas), tolerance)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shift", [0.0, 1.0, -40.0, 500.0])
@pytest.mark.parametrize("log_scale", [0.0, 1.5, -2.0, 4.2])  # the last is clamped
def test_special_boxes(device, loss_type, shift, log_scale):
    """Equal boxes (where every minimum ties), boxes that touch, lie inside or far apart, and a clamped size. In float32
    the reference's corners round, and part ties."""
    corner = torch.tensor([[3.0, 5.0], [700.0, 1200.0], [-20.0, -10.0]], dtype=torch.float64)
    anchors = torch.cat((corner, corner + torch.tensor([[16.0, 8.0]])), dim=1).float()
    deltas = torch.tensor([shift, 0.0, log_scale, -log_scale]).repeat(1, 3, 1).to(device).requires_grad_()
    indices, boxes = torch.tensor([[0, 1, 2]], dtype=torch.int32), anchors
    rest: Any = [x.to(device) for x in (anchors, indices, boxes, torch.tensor([0, 3]), torch.tensor([3.0]))]
    exact = deltas.detach().double().requires_grad_()
    oracle: Any = box_loss_reference
    rest64 = [x.double() if x.is_floating_point() else x for x in rest]
    ours, expected = kernel_loss([deltas], *rest, loss_type), oracle([exact], *rest64, loss_type)
    assert abs(ours - expected) <= 2e-6 * expected.clamp(min=1)
    (grad,), (exact_grad,) = torch.autograd.grad(ours, deltas), torch.autograd.grad(expected, exact)
    assert (grad - exact_grad).abs().max() <= 1e-5 * exact_grad.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("place_of_nan", range(4))
def test_nan_is_not_hidden(loss_fn, place, loss_type, place_of_nan):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    deltas[..., place_of_nan] = float("nan")
    rest = (anchors, torch.zeros(1, 1, dtype=torch.int32), anchors + 1, torch.tensor([0, 1]), torch.ones(1))
    deltas = deltas.to(place).requires_grad_()
    assert loss_fn([deltas], *[x.to(place) for x in rest], loss_type).isnan()


def test_weights_of_the_anchors(loss_fn, place):
    """Each foreground anchor's gradient takes its weight, and losses add up as the weights do. The weights of the other
    anchors are not read."""
    levels, anchors, indices, *rest = case(torch.float32, device=place)
    drawn = torch.rand(indices.shape, generator=torch.Generator().manual_seed(4)).to(place)
    weights = torch.where(indices >= 0, drawn, torch.nan)
    loss, whole = (loss_fn(levels, anchors, indices, *rest, "giou", w) for w in (weights, None))
    with torch.no_grad():
        others = loss_fn(levels, anchors, indices, *rest, "giou", 1 - weights)
    torch.testing.assert_close(loss.detach() + others, whole.detach(), rtol=1e-6, atol=0)
    ours, plain = (torch.cat(flatten_all(torch.autograd.grad(x, levels), 4), dim=1) for x in (loss, whole))
    assert_close([ours], [plain * drawn[..., None]], 1e-6)


def test_images_may_have_their_own_anchors(loss_fn, place):
    deltas, anchors, *rest = case(torch.float32, device=place)
    stacked = torch.stack((anchors, anchors + 2, anchors - 1))
    both: Any = loss_fn, box_loss_reference
    ours, expected = (f(deltas, stacked, *rest, "giou").detach() for f in both)
    assert abs(ours - expected) <= 1e-6 * expected
    alone = loss_fn(deltas, anchors, *rest, "giou")
    assert abs(alone - ours) > 1e-3


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_incoming_gradient_scales(place, loss_fn, factor, dtype):
    arguments: Any = (*case(dtype, device=place), "l1")
    plain = torch.autograd.grad(loss_fn(*arguments), arguments[0])
    scaled = torch.autograd.grad(loss_fn(*arguments) * factor, arguments[0])
    assert all(torch.equal(a * factor, b) for a, b in zip(plain, scaled, strict=True))  # powers of two


def test_backward_twice(device):
    arguments: Any = (*case(torch.float32, device=device), "l1")
    loss = kernel_loss(*arguments) * 3
    first = torch.autograd.grad(loss, arguments[0], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, arguments[0]), strict=True))


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_second_derivatives(device, loss_type):
    arguments = (*case(torch.float32, device=device), loss_type)
    losses = (lambda: kernel_loss(*arguments)), (lambda: box_loss_reference(*arguments))
    assert_differentiable_twice("box_loss", losses, arguments[0], 1e-4)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_foreground_costs_nothing(loss_fn, place, loss_type):
    deltas, anchors, indices, *rest = case(torch.float32, device=place)
    loss = loss_fn(deltas, anchors, indices.clamp(max=-1), *rest, loss_type)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, deltas))


def test_no_image(loss_fn, place):
    deltas, anchors, indices, boxes, offsets, normalizers = case(torch.float32, device=place)
    deltas = [level[:0] for level in deltas]
    assert loss_fn(deltas, anchors, indices[:0], boxes[:0], offsets[:1], normalizers[:0], "giou") == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({6: "l2"}, AssertionError, "Unsupported loss: 'l2'"),
        ({2: torch.zeros(3, 7, dtype=torch.int32)}, ValueError, r"indices must be .* = \(3, 123\), got \(3, 7\)"),
        ({0: [torch.zeros(3, 105, 4), torch.zeros(3, 18, 4).half()]}, ValueError, "levels must share a dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments: list[Any] = [*case(torch.float32), "l1"]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error, match=message):
        box_loss(*arguments)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("loss_type", "output"),
    [
        ("l1", "both"),
        ("ciou", "loss"),
        ("ciou", "gradients"),
        pytest.param("l1", "loss", marks=SLOW),
        pytest.param("l1", "gradients", marks=SLOW),
        pytest.param("ciou", "both", marks=SLOW),
    ],
)
def test_opcheck(device, loss_type, output):
    deltas, *rest = case(torch.float32, device=device)
    levels = [level.contiguous() for level in flatten_all(deltas, 4)]
    if output != "loss":
        levels = [level.detach() for level in levels]
    factor = torch.tensor(0.5, device=device) if output == "gradients" else None
    outputs = {"loss": (True, False), "gradients": (False, True), "both": (True, True)}[output]
    torch.library.opcheck(module._box_loss_op, (levels, *rest, factor, loss_type, *outputs, None))


def test_fullgraph_compile(device, monkeypatch):
    arguments: Any = (*case(torch.float32, device=device), "smooth_l1")
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    loss = torch.compile(box_loss, fullgraph=True, backend="aot_eager")(*arguments)
    expected = kernel_loss(*arguments)
    assert loss == expected
    assert_close(torch.autograd.grad(loss, arguments[0]), torch.autograd.grad(expected, arguments[0]), 1e-7)


def test_one_launch_forward_and_one_to_sum():
    assert [launch.kernel.__name__ for launch in launches_of(KERNEL_CALLS["box_loss bf16 giou"].run)] == [
        "_box_loss_kernel", "_sum_kernel",
    ]  # fmt: skip


# As compiled code


@pytest.mark.parametrize("name", names("box_loss"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("box_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

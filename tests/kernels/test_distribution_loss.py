"""Distribution focal loss with an IoU loss, by the reference and by the kernel, against the paper's formula in float64,
side by side of each anchor."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from retina_fast.kernels import distribution_loss as module
from retina_fast.kernels.distribution_loss import distribution_loss, distribution_loss_reference
from retina_fast.kernels.levels import flatten_all
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.kernels.test_box_loss import assert_close
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names

IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
N = 5


def kernel_loss(distributions, *arguments):
    """The loss by the kernel, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return distribution_loss(distributions, *arguments)


@pytest.fixture(params=["reference", "kernel"])
def path(request):
    return request.param


@pytest.fixture
def loss_fn(path):
    return kernel_loss if path == "kernel" else distribution_loss_reference


@pytest.fixture
def place(path, device):
    return device if path == "kernel" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned_small_tiles(monkeypatch):
    """Several tiles a level, and several parts a tile; what a kernel leaves unwritten is NaN."""
    for name, value in (("_TILE", 16), ("_ROWS", 8), ("_ZEROS", 256)):
        monkeypatch.setattr(module, name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(dtype=torch.float32, channels_last=True, device="cpu", n=N):
    """Levels of 2 images with 3 and 1 ground truths, of which some reach farther than n units."""
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    levels = [1.5 * torch.randn(2, 2 * 4 * (n + 1), h, w, generator=generator) for h, w in ((5, 3), (2, 2))]
    levels = [level.to(device, dtype).contiguous(memory_format=layout).requires_grad_() for level in levels]
    corner = torch.rand(38, 2, generator=generator) * 20
    anchors = torch.cat((corner, corner + 5 + 30 * torch.rand(38, 2, generator=generator)), dim=1)
    boxes = anchors[torch.tensor([1, 5, 30, 8])] + torch.tensor([-2.0, -1.0, 3.0, 2.0])
    drawn = torch.randint(-2, 3, (2, 38), generator=generator)
    indices = torch.stack((drawn[0], drawn[1].clamp(max=0)))
    indices[0, :16] = -1  # a tile without foreground
    rest = anchors, indices.int(), boxes, torch.tensor([0, 3, 4]), torch.tensor([6.0, 9.0])
    return levels, *[x.to(device) for x in rest], n


def by_the_paper(distributions, anchors, indices, boxes, offsets, normalizers, n, loss_type="giou"):
    """Equation 6, one side at a time, and torchvision's IoU loss of the box that the expectations make."""
    flat = torch.cat(flatten_all(distributions, 4 * (n + 1)), dim=1).cpu().double()
    total = torch.zeros((), dtype=torch.float64)
    for b, a in (indices >= 0).nonzero().tolist():
        x1, y1, x2, y2 = (anchors[a] if anchors.dim() == 2 else anchors[b, a]).cpu().double().tolist()
        truth = boxes[offsets[b] + indices[b, a]].cpu().double()
        middle, signs = ((x1 + x2) / 2, (y1 + y2) / 2), (-1, -1, 1, 1)
        sides, dfl = [], torch.zeros((), dtype=torch.float64)
        for side in range(4):
            s = flat[b, a].view(4, n + 1)[side].softmax(dim=0)
            unit = ((x2 - x1) if side % 2 == 0 else (y2 - y1)) / 8
            y = min(max(signs[side] * (float(truth[side]) - middle[side % 2]) / unit, 0.0), float(n))
            low = min(math.floor(y), n - 1)
            dfl = dfl - (low + 1 - y) * s[low].log() - (y - low) * s[low + 1].log()
            sides.append(middle[side % 2] + signs[side] * unit * (s * torch.arange(n + 1)).sum())
        loss = IOU_LOSSES[loss_type](torch.stack(sides), truth, eps=1e-7)
        total = total + (loss + dfl / 4 / 8) / normalizers[b].cpu().double()
    return total


# Rounded once, as the expected gradient is; the interpreter truncates to bfloat16, by a unit in the last place.
@pytest.mark.parametrize(
    ("dtype", "channels_last", "tolerance"),
    [(torch.float32, True, 1e-5), (torch.float32, False, 1e-5), (torch.bfloat16, True, 2**-7),
     (torch.float16, True, 2**-10)],
)  # fmt: skip
def test_matches_the_paper_in_float64(loss_fn, place, dtype, channels_last, tolerance):
    for loss_type in IOU_LOSSES if dtype == torch.float32 and channels_last else ("giou",):
        arguments: Any = (*case(dtype, channels_last, place), loss_type)
        levels, ours, exact = arguments[0], loss_fn(*arguments), by_the_paper(*arguments)
        assert ours.dtype == torch.float32
        assert abs(ours.cpu() - exact) <= 1e-5 * abs(exact)
        assert_close(torch.autograd.grad(ours, levels), torch.autograd.grad(exact, levels), tolerance)


@pytest.mark.parametrize("y", [-1.0, 0.0, 0.25, 1.0, 2.999, 3.0, 5.0])
def test_targets_between_at_and_beyond_the_places(loss_fn, place, y):
    """The left side at y units from the centre, the others at 1.25, 2 and 3, of distributions over 0 to 3."""
    anchors, distances = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([y, 1.25, 2.0, 3.0])
    truth = 4 + distances[None] * torch.tensor([-1, -1, 1, 1])
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weights = (1 - (distances.clamp(0, 3)[:, None] - torch.arange(4)).abs()).clamp(min=0)
    dfl = -(weights * x.log_softmax(dim=1)).sum(dim=1).mean()
    box = 4 + (x.softmax(dim=1) @ torch.arange(4.0))[None] * torch.tensor([-1, -1, 1, 1])
    rest = anchors, torch.zeros(1, 1, dtype=torch.int32), truth, torch.tensor([0, 1]), torch.ones(1)
    loss = loss_fn([x.view(1, 1, 16).to(place)], *[r.to(place) for r in rest], 3)
    assert loss.item() == pytest.approx((generalized_box_iou_loss(box, truth)[0] + dfl / 8).item(), rel=1e-5)


def test_a_side_that_is_certain(loss_fn, place):
    """Logits so far apart that the others' probabilities are 0: no NaN, and no gradient where the target is met."""
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    x = torch.full((1, 1, 4, 6), -1e4)
    x[..., 2] = 1e4
    x = x.flatten(2).to(place).requires_grad_()
    indices, truth = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[2.0, 2.0, 6.0, 6.0]])
    rest = indices, truth, torch.tensor([0, 1]), torch.ones(1)
    loss = loss_fn([x], anchors.to(place), *[r.to(place) for r in rest], 5)
    assert abs(loss) <= 1e-6
    assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("side", range(4))
def test_nan_is_not_hidden(loss_fn, place, side):
    anchors, x = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.zeros(1, 1, 4 * (N + 1))
    x[..., side * (N + 1) + 1] = float("nan")
    rest: Any = torch.zeros(1, 1, dtype=torch.int32), anchors + 1, torch.tensor([0, 1]), torch.ones(1)
    assert loss_fn([x.to(place)], anchors.to(place), *[r.to(place) for r in rest], N).isnan()


def test_weights_of_the_anchors(loss_fn, place):
    """Each foreground anchor's gradient takes its weight, and losses add up as the weights do. The weights of the other
    anchors are not read."""
    levels, anchors, indices, *rest = case(device=place)
    drawn = torch.rand(indices.shape, generator=torch.Generator().manual_seed(4)).to(place)
    weights = torch.where(indices >= 0, drawn, torch.nan)
    loss, whole = (loss_fn(levels, anchors, indices, *rest, "giou", w) for w in (weights, None))
    with torch.no_grad():
        others = loss_fn(levels, anchors, indices, *rest, "giou", 1 - weights)
    torch.testing.assert_close(loss.detach() + others, whole.detach(), rtol=1e-6, atol=0)
    ours, plain = (
        torch.cat(flatten_all(torch.autograd.grad(x, levels), 4 * (rest[-1] + 1)), dim=1) for x in (loss, whole)
    )
    assert_close([ours], [plain * drawn[..., None]], 1e-6)


def test_images_may_have_their_own_anchors(loss_fn, place):
    levels, anchors, *rest = case(device=place)
    stacked = torch.stack((anchors, anchors + 2))
    ours, exact = loss_fn(levels, stacked, *rest).detach(), by_the_paper(levels, stacked, *rest).detach()
    assert abs(ours.cpu() - exact) <= 1e-5 * exact


def test_the_incoming_gradient_scales(loss_fn, place):
    arguments = case(device=place)
    plain = torch.autograd.grad(loss_fn(*arguments) * 64, arguments[0])
    scaled = torch.autograd.grad(loss_fn(*arguments) * 16, arguments[0])
    assert all(torch.equal(a / 4, b) for a, b in zip(plain, scaled, strict=True))  # powers of two


def test_backward_twice_and_second_derivatives(device):
    arguments = case(device=device)
    loss = kernel_loss(*arguments) * 3
    first = torch.autograd.grad(loss, arguments[0], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, arguments[0]), strict=True))
    losses = (lambda: kernel_loss(*arguments)), (lambda: distribution_loss_reference(*arguments))
    assert_differentiable_twice("distribution_loss", losses, arguments[0], 1e-4)


def test_no_foreground_and_no_image_cost_nothing(loss_fn, place):
    levels, anchors, indices, boxes, offsets, normalizers, n = case(device=place)
    loss = loss_fn(levels, anchors, indices.clamp(max=-1), boxes, offsets, normalizers, n)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, levels))
    none = [level[:0] for level in levels]
    assert loss_fn(none, anchors, indices[:0], boxes[:0], offsets[:1], normalizers[:0], n) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({7: "l1"}, "loss_type must be one of giou, diou, ciou, got 'l1'"),
        ({6: 0}, r"a level must be \(B, A\*4, H, W\)|reg_max must be at least 1, got 0"),
        ({6: 16}, r"a level must be \(B, A\*68, H, W\) or \(B, N, 68\)"),
        ({2: torch.zeros(2, 7, dtype=torch.int32)}, r"indices must be .* = \(2, 38\), got \(2, 7\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments: list[Any] = [*case(), "giou"]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        distribution_loss(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["loss", "gradients", "both"])
def test_opcheck(device, output):
    levels, *rest, n = case(device=device)
    levels = [level.contiguous() for level in flatten_all(levels, 4 * (n + 1))]
    if output != "loss":
        levels = [level.detach() for level in levels]
    factor = torch.tensor(0.5, device=device) if output == "gradients" else None
    outputs = {"loss": (True, False), "gradients": (False, True), "both": (True, True)}[output]
    torch.library.opcheck(module._distribution_loss_op, (levels, *rest, factor, n, "giou", *outputs, None))


def test_fullgraph_compile(device, monkeypatch):
    arguments = case(device=device)
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    loss = torch.compile(distribution_loss, fullgraph=True, backend="aot_eager")(*arguments)
    expected = kernel_loss(*arguments)
    assert loss == expected
    assert_close(torch.autograd.grad(loss, arguments[0]), torch.autograd.grad(expected, arguments[0]), 1e-7)


def test_one_launch_forward_and_one_to_sum():
    launches = launches_of(KERNEL_CALLS["distribution_loss bf16"].run)
    assert [launch.kernel.__name__ for launch in launches] == ["_distribution_loss_kernel", "_sum_kernel"]


# As compiled code


@pytest.mark.parametrize("name", names("distribution_loss"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("distribution_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

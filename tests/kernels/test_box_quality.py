"""The IoU of predicted boxes with their ground truths, by the reference and by the kernel, against torchvision's coder
and IoU in float64."""

from typing import Any
from unittest import mock

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from retina_fast.kernels import box_quality as module
from retina_fast.kernels.box_quality import box_quality, box_quality_reference
from retina_fast.kernels.levels import flatten_all
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.kernels.test_box_loss import case as box_loss_case
from tests.ptx.cases import OTHER_ORDERS, check, names


@pytest.fixture(params=["reference", "kernel"])
def path(request):
    return request.param


@pytest.fixture
def place(path, device):
    return device if path == "kernel" else torch.device("cpu")


@pytest.fixture
def quality_of(path):
    def by_kernel(*arguments):
        with mock.patch.object(module, "runs_triton", return_value=True):
            return box_quality(*arguments)

    return by_kernel if path == "kernel" else box_quality_reference


@pytest.fixture(autouse=True)
def _poisoned_small_tiles(monkeypatch):
    """Several tiles a level; what a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(module, "_TILE", 32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(dtype=torch.float32, device="cpu"):
    *arguments, _ = box_loss_case(dtype, device=device)
    return arguments


def test_of_distributions(quality_of, place, monkeypatch):
    """The box from each anchor's centre, by 4 expectations in float64."""
    monkeypatch.setattr(module, "_DISTRIBUTIONS_TILE", 16)
    _, anchors, indices, boxes, offsets = case(device=place)
    generator = torch.Generator().manual_seed(1)
    levels = [(2 * torch.randn(3, n, 4 * 6, generator=generator)).to(place) for n in (105, 18)]
    sides = torch.cat(levels, dim=1).cpu().double().view(3, 123, 4, 6).softmax(dim=3) @ torch.arange(6.0).double()
    own, size = anchors.cpu().double(), (anchors[:, 2:] - anchors[:, :2]).cpu().double()
    centre = own[:, :2] + size / 2
    predicted = torch.cat((centre - sides[..., :2] * size / 8, centre + sides[..., 2:] * size / 8), dim=2)
    expected = torch.zeros(3, 123, dtype=torch.float64)
    for b, n in (indices >= 0).nonzero().tolist():
        truth = boxes[offsets[b] + indices[b, n]].cpu().double()
        expected[b, n] = box_iou(predicted[b, n][None], truth[None])
    ours = quality_of(levels, anchors, indices, boxes, offsets, 5)
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert (ours > 0.1).any()


def exact(deltas, anchors, indices, boxes, offsets):
    """Anchor by anchor, in float64."""
    flat = torch.cat([level.detach().cpu().double() for level in flatten_all(deltas, 4)], dim=1)
    quality = torch.zeros(indices.shape, dtype=torch.float64)
    for b, n in (indices >= 0).nonzero().tolist():
        own = anchors[n] if anchors.dim() == 2 else anchors[b, n]
        box = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(flat[b, n][None], own.cpu().double()[None])
        quality[b, n] = box_iou(box, boxes[offsets[b] + indices[b, n]].cpu().double()[None])
    return quality


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_torchvision_in_float64(quality_of, place, dtype):
    arguments = case(dtype, place)
    quality = quality_of(*arguments)
    assert quality.dtype == torch.float32
    assert not quality.requires_grad
    torch.testing.assert_close(quality.cpu().double(), exact(*arguments), rtol=1e-5, atol=1e-6)
    assert (quality > 0.1).any()


def test_images_may_have_their_own_anchors(quality_of, place):
    deltas, anchors, *rest = case(device=place)
    stacked = torch.stack((anchors, anchors + 2, anchors - 1))
    expected = exact(deltas, stacked, *rest)
    torch.testing.assert_close(quality_of(deltas, stacked, *rest).cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_small_box_far_from_the_origin(device):
    """Where corners are rounded to 6e-5 pixels, the kernel is exact, since it looks at what is left of the centre."""
    anchors = torch.tensor([[1000.0, 900.0, 1004.0, 903.0]])
    boxes = torch.tensor([[1001.0, 900.5, 1004.5, 903.25]])
    deltas = [torch.tensor([[[0.03, -0.07, 0.02, 0.11]]]).to(device)]
    rest: Any = torch.zeros(1, 1, dtype=torch.int32), boxes, torch.tensor([0, 1])
    with mock.patch.object(module, "runs_triton", return_value=True):
        quality = box_quality(deltas, anchors.to(device), *[x.to(device) for x in rest])
    expected = exact(deltas, anchors, *rest)
    torch.testing.assert_close(quality.cpu().double(), expected, rtol=1e-6, atol=0)


def test_perfect_boxes_boxes_apart_and_none(quality_of, place):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.3, 0.1, 37.9, 9.7], [5.0, 5.0, 15.0, 15.0]])
    boxes = torch.stack((anchors[1], anchors[0]))
    arguments = [x.to(place) for x in (anchors, torch.tensor([[0, 0, -1]]), boxes, torch.tensor([0, 2]))]
    quality = quality_of([torch.zeros(1, 3, 4, device=place)], *arguments)[0].tolist()
    assert quality == [0.0, pytest.approx(1.0, abs=1e-6), 0.0]
    assert quality[1] <= 1
    arguments[1] = arguments[1].clamp(max=-1)
    assert not quality_of([torch.zeros(1, 3, 4, device=place)], *arguments).any()


@pytest.mark.parametrize("place_of_nan", range(4))
def test_nan_is_not_hidden(quality_of, place, place_of_nan):
    anchors, deltas = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.zeros(1, 1, 4)
    deltas[..., place_of_nan] = float("nan")
    arguments = anchors, torch.zeros(1, 1, dtype=torch.int32), anchors + 1, torch.tensor([0, 1])
    assert quality_of([deltas.to(place)], *(x.to(place) for x in arguments)).isnan().all()


def test_no_image(quality_of, place):
    deltas, anchors, indices, boxes, offsets = case(device=place)
    assert quality_of([level[:0] for level in deltas], anchors, indices[:0], boxes[:0], offsets[:1]).shape == (0, 123)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(3, 7, dtype=torch.int32)}, r"indices must be .* = \(3, 123\), got \(3, 7\)"),
        ({2: torch.zeros(3, 123)}, "indices must be integers"),
        ({1: torch.zeros(5, 4)}, r"anchors must be .*, got \(5, 4\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = case()
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        box_quality(*arguments)


def test_registration(device, monkeypatch):
    deltas, *rest = case(device=device)
    levels = [level.detach().contiguous() for level in flatten_all(deltas, 4)]
    torch.library.opcheck(module._op, (levels, *rest, 0))
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    compiled = torch.compile(box_quality, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(levels, *rest), box_quality(levels, *rest))


def test_one_launch():
    launches = launches_of(KERNEL_CALLS["box_quality bf16"].run)
    assert [launch.kernel.__name__ for launch in launches] == ["_box_quality_kernel"]


# As compiled code


@pytest.mark.parametrize("name", names("box_quality"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("box_quality"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

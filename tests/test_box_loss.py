"""Box loss against torchvision's, loss and gradient, in float64 and below."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, _box_loss

from retina_fast.kernels.box_loss import LOSS_TYPES, box_loss


def case(dtype, channels_last=True):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    deltas = [torch.randn(3, 3 * 4, h, w, generator=generator) * 0.7 for h, w in ((7, 5), (3, 2))]
    deltas = [level.to(dtype).contiguous(memory_format=layout).requires_grad_() for level in deltas]
    n = 3 * (35 + 6)
    corner = torch.rand(n, 2, generator=generator) * 50
    anchors = torch.cat((corner, corner + 5 + 30 * torch.rand(n, 2, generator=generator)), dim=1)
    counts = [4, 0, 2]
    boxes = anchors[torch.randint(0, n, (sum(counts),), generator=generator)] + torch.tensor([-2.0, -1.0, 3.0, 2.0])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.stack([torch.randint(-2, max(count, 1), (n,), generator=generator) for count in counts])
    indices[1] = indices[1].clamp(max=-1)
    return deltas, anchors, indices.int(), boxes, offsets, torch.tensor([6.0, 3.0, 9.0])


def torchvision_loss(deltas, anchors, indices, boxes, offsets, normalizers, loss_type):
    flat = torch.cat([level.permute(0, 2, 3, 1).reshape(3, -1, 4) for level in deltas], dim=1).double()
    coder, total = BoxCoder((1.0, 1.0, 1.0, 1.0)), 0
    for b in range(3):
        foreground = indices[b] >= 0
        truths = boxes[offsets[b] : offsets[b + 1]][indices[b][foreground].long()].double()
        total += _box_loss(loss_type, coder, anchors[foreground].double(), truths, flat[b][foreground]) / normalizers[b]
    return total


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_matches_torchvision(loss_type, dtype, channels_last):
    arguments = (*case(dtype, channels_last), loss_type)
    deltas, ours, theirs = arguments[0], box_loss(*arguments), torchvision_loss(*arguments)
    assert ours.dtype == torch.float32
    assert abs(ours - theirs) <= 1e-5 * abs(theirs)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # bf16 rounds the gradient once
    for grad, expected in zip(torch.autograd.grad(ours, deltas), torch.autograd.grad(theirs, deltas), strict=True):
        assert (grad.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_foreground_costs_nothing(loss_type):
    deltas, anchors, indices, boxes, offsets, normalizers = case(torch.float32)
    loss = box_loss(deltas, anchors, indices.clamp(max=-1), boxes, offsets, normalizers, loss_type)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, deltas))


def test_unknown_loss_is_refused():
    with pytest.raises(AssertionError, match="Unsupported loss: 'l2'"):
        box_loss(*(*case(torch.float32), "l2"))

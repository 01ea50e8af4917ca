"""Cases of the focal loss, and the exact result, which the tests of it share."""

from unittest import mock

import torch

from retina_fast.kernels import focal_loss as module
from retina_fast.kernels.focal_loss import focal_loss, focal_loss_reference


def kernel_loss(logits, labels, normalizers, num_classes, alpha=0.25, gamma=2.0):
    """The loss by the kernels, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return focal_loss(logits, labels, normalizers, num_classes, alpha, gamma)


def case(k, device="cpu", dtype=torch.float32, shapes=((7, 5), (3, 2)), foreground=0.02, ignored=0.02, spread=3.0):
    """Levels (2, 3K, H, W) in channels_last memory, labels (2, N), normalizers (2,)."""
    generator = torch.Generator().manual_seed(k)
    logits = [torch.randn(2, 3 * k, h, w, generator=generator) * spread - 1 for h, w in shapes]
    anchors = sum(3 * h * w for h, w in shapes)
    drawn = torch.rand(2, anchors, generator=generator)
    labels = torch.randint(0, k, (2, anchors), generator=generator, dtype=torch.int32)
    labels[drawn > foreground] = -1
    labels[drawn > 1 - ignored] = -2
    levels = [level.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_() for level in logits]
    return levels, labels.to(device), torch.tensor([3.0, 17.0], device=device)


def loss_and_grads(function, inputs, k, alpha=0.25, gamma=2.0, factor=1.0):
    logits, labels, normalizers = inputs
    loss = function(logits, labels, normalizers, k, alpha, gamma)
    return loss.detach(), torch.autograd.grad(loss * factor, logits)


def exact(inputs, k, alpha=0.25, gamma=2.0, factor=1.0):
    logits, labels, normalizers = inputs
    logits = [level.detach().cpu().double().requires_grad_() for level in logits]
    doubles = logits, labels.cpu(), normalizers.cpu().double()
    return loss_and_grads(focal_loss_reference, doubles, k, alpha, gamma, factor)


def error(ours, theirs):
    """Relative norm of the difference, over one tensor or the levels' gradients together."""
    ours, theirs = (
        torch.cat([t.detach().cpu().double().flatten() for t in (x if isinstance(x, tuple | list) else [x])])
        for x in (ours, theirs)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()

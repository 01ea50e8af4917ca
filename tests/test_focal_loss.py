import pytest
import torch

from retina_fast.kernels.focal_loss import focal_loss, focal_loss_reference


def case(k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, 3 * k, h, w, generator=generator) * 3 for h, w in ((7, 5), (3, 2))]
    logits = [level.to(dtype).to(memory_format=torch.channels_last).requires_grad_() for level in logits]
    labels = torch.randint(-2, k, (2, 3 * (35 + 6)), generator=generator)
    return logits, labels, torch.tensor([3.0, 17.0])


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("k", [1, 7])
def test_matches_the_reference(k, alpha, gamma):
    logits, labels, normalizers = case(k)
    ours = focal_loss(logits, labels, normalizers, k, alpha, gamma)
    doubles = [level.detach().double().requires_grad_() for level in logits]
    theirs = focal_loss_reference(doubles, labels, normalizers, k, alpha, gamma)
    grads = torch.autograd.grad(ours * 3, logits)
    expected = torch.autograd.grad(theirs * 3, doubles)
    assert (ours - theirs).abs() <= 1e-6 * theirs
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).norm() <= 1e-6 * reference.norm()

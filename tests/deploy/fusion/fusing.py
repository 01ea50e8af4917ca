"""Fusing a small model and checking that its output stays."""

import torch

from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.deploy.fusion.layers import FusedConv


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@torch.no_grad()
def fused_count(model, x):
    """Fuse, check that the output stays, and return how many convs are fused and their activations."""
    before = model(x)
    count = fuse_convs(model, lambda: model(x))
    assert error(model(x), before) < 1e-5
    return count, [module.activation for module in model.modules() if isinstance(module, FusedConv)]


def chain():
    return torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU())


X4 = torch.randn(1, 4, 6, 6)

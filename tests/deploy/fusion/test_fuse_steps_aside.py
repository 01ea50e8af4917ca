"""Convs that must not be fused: hooks, a user's own classes, and what a conv cannot take with it."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork

from retina_fast.deploy.fusion.fuse import fuse_convs
from tests.deploy.fusion.fusing import X4, chain, error, fused_count

pytestmark = pytest.mark.usefixtures("one_thread")


def block(cls=BasicBlock):
    made = cls(8, 8 // cls.expansion)
    for name in ("bn1", "bn2", "bn3"):
        if hasattr(made, name):
            setattr(made, name, nn.Identity())
    return made.eval()


X8 = torch.randn(1, 8, 6, 6)


@pytest.mark.parametrize("part", [0, 1])
def test_hooks_in_a_chain(part):
    model, seen = chain(), []
    model[part].register_forward_hook(lambda *args: seen.append(args[-1]))
    count, activations = fused_count(model, X4)
    assert (count, activations) == ((0, []) if part == 0 else (1, ["none"]))
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[-1]) or error(seen[-1], seen[0]) < 1e-5


@pytest.mark.parametrize("part", ["conv1", "conv2", "bn2", "relu", "block"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_hooks_in_a_block(cls, part):
    model, seen = nn.Sequential(block(cls)), []
    (model[0] if part == "block" else getattr(model[0], part)).register_forward_hook(
        lambda *args: seen.append(args[-1])
    )
    _, activations = fused_count(model, X8)
    assert set(activations) == {"none"}  # the other convs are packed, no more
    assert type(model[0]) is cls
    assert len(seen) == 3 * (1 if part != "relu" else {BasicBlock: 2, Bottleneck: 3}[cls])


class OwnBlock(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


class Peeking(nn.Module):
    """Reads what lies between the conv and the activation, past the Sequential that holds them."""

    def __init__(self):
        super().__init__()
        self.chain, self.block = chain(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        y = self.chain[0](x)
        return self.block(self.chain[1](y)) + y


class Twice(nn.Module):
    """Calls the chain, and its conv once more."""

    def __init__(self):
        super().__init__()
        self.chain = chain()

    def forward(self, x):
        return self.chain(x) + self.chain[0](x)


def shared_conv():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.Tanh()))


def shared_activation():
    """Between conv and the last ReLU lies a Sequential that has come before."""
    scale = nn.Hardtanh(-0.1, 0.1)
    return nn.Sequential(scale, nn.Conv2d(4, 4, 1), scale, nn.ReLU())


@pytest.mark.parametrize(
    ("make", "x", "activations"),
    [
        (lambda: OwnBlock(8, 8).eval(), X8, {"none"}),
        (Peeking, X4, {"none", "relu"}),
        (Twice, X4, {"none"}),
        (shared_conv, X4, {"none"}),
        (shared_activation, X4, {"none"}),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6()), X4, {"none"}),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()), X4, set()),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU()), X4, set()),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.ReLU()), X4, set()),
    ],
    ids=["own block", "peeking", "twice", "shared conv", "shared part", "relu6", "reflect", "same", "weight norm"],
)
def test_what_must_not_be_fused(make, x, activations):
    torch.manual_seed(0)
    assert set(fused_count(make(), x)[1]) == activations


def test_a_pyramid_with_a_hook_or_a_method_of_its_own():
    for change in ("hook", "method", "norm"):
        pyramid: Any = FeaturePyramidNetwork([4, 4], 8, norm_layer=nn.BatchNorm2d if change == "norm" else None).eval()
        maps = {"a": torch.randn(1, 4, 9, 9), "b": torch.randn(1, 4, 5, 5)}
        if change == "hook":
            pyramid.inner_blocks[0][0].register_forward_hook(lambda *_: None)
        elif change == "method":
            pyramid.get_result_from_inner_blocks = lambda x, i, blocks=pyramid.inner_blocks: blocks[i](x) * 2
        with torch.no_grad():
            before = pyramid(maps)
            fuse_convs(pyramid, partial(pyramid, maps))
            assert type(pyramid) is FeaturePyramidNetwork
            assert all(error(ours, before[name]) < 1e-5 for name, ours in pyramid(maps).items())

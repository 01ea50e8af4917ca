"""The entropy score is what a network with Gaussian weights does."""

import math
import random
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

from retina_fast.backbones.specification import MOBILE_SPINENET, SPINENET
from retina_fast.backbones.spinenet import SIZES, Residual, Size, SpineNet
from retina_fast.backbones.spinenet_mobile import MOBILE_SIZES, MobileSize, MobileSpineNet
from retina_fast.search.score import LEVEL_WEIGHTS, entropies, entropy_score
from retina_fast.search.space import PAPER


class Strided(nn.Module):
    """A pool that takes the first value, and so leaves the variance."""

    def __init__(self, stride: Any) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :: self.stride, :: self.stride]


def linear(net: Any) -> Any:
    """The network in float64 without norms, activations, shortcuts and gates, with weights from N(0, 1)."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU | nn.SiLU | SqueezeExcitation):
            net.set_submodule(name, nn.Identity())
        if isinstance(module, nn.MaxPool2d):
            net.set_submodule(name, Strided(module.stride))
        if isinstance(module, Residual):
            module.shortcut = Strided(1)
            module.shortcut.register_forward_hook(lambda module, x, y: 0.0)
        if hasattr(module, "has_shortcut"):
            module.has_shortcut = False
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"  # zeros would lower the variance at the edges
            module._reversed_padding_repeated_twice = [module.padding[0]] * 4  # pyrefly: ignore[bad-assignment]
            nn.init.normal_(module.weight)
    return net.double()


@pytest.mark.parametrize("family", [pytest.param("spinenet", marks=pytest.mark.slow), "mobile", "sample"])
@torch.no_grad()
def test_the_closed_form_is_what_a_network_does(family, one_thread):
    torch.manual_seed(0)
    kwargs: Any = {"norm_layer": lambda channels: nn.Identity()}
    size: Any = Size(0.5, 0.5, 1, 16, 8, 1, 128, 3)
    rows: Any = SPINENET
    if family == "mobile":
        size, rows = MobileSize(1.0, 16, 128), MOBILE_SPINENET
        net: Any = MobileSpineNet(rows, 1.0, 16, **kwargs)
    else:
        if family == "sample":
            rows = PAPER.decode(PAPER.sample(random.Random(0)))
        net = SpineNet(rows, 0.5, 0.5, 1, 16, **kwargs)
    levels = linear(net)(torch.randn(4, 3, 128, 128, dtype=torch.float64))
    expected = entropies(rows, size)
    for name, level in levels.items():
        measured = math.log(2 * math.pi * math.e * float(level.square().mean())) / 2
        assert measured == pytest.approx(expected[int(name[1])], rel=0.03)


def test_weights_of_the_levels_and_what_scores_more():
    by_level = entropies(SPINENET, SIZES["49"])
    score = entropy_score(SPINENET, SIZES["49"])
    assert score == pytest.approx(sum(LEVEL_WEIGHTS[level] * value for level, value in by_level.items()))
    assert sum(LEVEL_WEIGHTS.values()) == 1 + 1 + 6
    assert entropy_score(SPINENET, SIZES["49"], dict.fromkeys(range(3, 8), 0.0) | {5: 1.0}) == by_level[5]
    assert entropy_score(SPINENET, SIZES["49s"]) < score < entropy_score(SPINENET, SIZES["96"])
    assert entropy_score(MOBILE_SPINENET, MOBILE_SIZES["49xs"]) < entropy_score(MOBILE_SPINENET, MOBILE_SIZES["49"])

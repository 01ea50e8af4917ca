"""The look before training at how many values the BatchNorms will see."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from retina_fast.checkpoint import build
from retina_fast.data.errors import UserError
from retina_fast.train.few_values import fewest_cells, warn_of_few_values
from tests.model.pairs import torchvision_model


def detector(norm: Any) -> Any:
    """Its backbone has maps of 1/8 and, behind a norm, 1/16 of the image; its heads have no norm."""
    from retina_fast import from_torchvision

    model = from_torchvision(torchvision_model())
    model.backbone.append(nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), norm(16)))
    model.transform.size_divisible = 16
    model.transform._skip_resize = True
    return model.train()


def said(network, crop=64, sizes=(), **changes):
    settings: Any = SimpleNamespace(**{"batch_size": 2, "accumulate": 1} | changes)
    data: Any = SimpleNamespace(sizes=dict(enumerate(sizes)))
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few_values(network, settings, data, crop)
    assert torch.equal(torch.get_rng_state(), before)  # the run draws the same numbers as without the look
    return [str(warning.message) for warning in caught]


def test_the_norm_and_its_few_values_are_named():
    (message,) = said(detector(nn.BatchNorm2d), crop=40)  # padded to 48
    assert message.startswith("backbone.2.1 will see 18 values of a channel, 2 x 3 x 3 cells: ")
    assert message.endswith("give a larger --crop or --batch-size")
    (message,) = said(detector(nn.BatchNorm2d), crop=40, batch_size=4, accumulate=2)
    assert "18 values" in message
    assert message.endswith("or a smaller --accumulate")
    with pytest.raises(UserError, match=r"backbone\.2\.1 will see 1 value of a channel, 1 x 1 x 1 cells, which has no"):
        said(detector(nn.BatchNorm2d), crop=16, batch_size=1)


def test_enough_values_and_other_norms_are_no_reason_to_warn():
    assert not said(detector(nn.BatchNorm2d), crop=96)  # 72 values
    assert not said(detector(lambda channels: nn.GroupNorm(4, channels)), crop=16)
    frozen = detector(nn.BatchNorm2d)
    frozen.backbone[2].eval()
    assert not said(frozen, crop=16)


def test_of_whole_images_the_one_of_median_size_counts():
    few, enough = (32, 32), (128, 128)
    assert not said(detector(nn.BatchNorm2d), 0, [few, enough, enough, None])
    assert len(said(detector(nn.BatchNorm2d), 0, [few, few, enough])) == 1
    assert not said(detector(nn.BatchNorm2d), 0, [None])


def test_spinenet_on_small_crops():
    network = build("retinanet_spinenet49xs_mobile", 1).train()
    height, width, name = fewest_cells(network, 256, 256) or (0, 0, "")
    assert (height, width) == (2, 2)
    assert name.startswith("backbone.")

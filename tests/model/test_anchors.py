"""Anchors: equal to torchvision's bit for bit, and made once a size."""

from typing import Any

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retina_fast import anchors as module
from retina_fast.anchors import batch_anchors, generator_of
from retina_fast.builders import MODELS


@pytest.fixture
def generator() -> AnchorGenerator:
    return AnchorGenerator(((17, 20.7), (32, 40.3)), ((0.5, 1.0, 2.0),) * 2)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Counts the times that anchors are made."""
    calls: list[int] = []
    original = module._anchors
    monkeypatch.setattr(module, "_anchors", lambda *args: calls.append(1) or original(*args))
    return calls


def case(height=64, width=101, cells=((8, 13), (4, 7))):
    return torch.rand(2, 3, height, width), [(height, width)] * 2, [torch.rand(2, 8, h, w) for h, w in cells]


@pytest.mark.parametrize("shape", [{}, {"height": 61, "width": 122, "cells": ((8, 16), (1, 1))}])
def test_equal_torchvisions_and_are_made_once(generator, made, shape):
    batch, sizes, features = case(**shape)
    expected = generator(ImageList(batch, sizes), features)
    for _ in range(3):
        anchors = batch_anchors(generator, batch, sizes, features)
        assert torch.equal(anchors, expected[0])  # one tensor, which all images share
    assert len(made) == 1


def test_a_generator_of_the_users_own_may_give_every_image_others(generator):
    class Own(AnchorGenerator):
        def forward(self, image_list, feature_maps):
            first, second = super().forward(image_list, feature_maps)
            return [first, second + 1]

    own = Own(generator.sizes, generator.aspect_ratios)
    anchors, shared = (batch_anchors(one, *case()) for one in (own, generator))
    assert torch.equal(anchors, torch.stack((shared, shared + 1)))


def test_streams_share_nothing(generator, made, monkeypatch):
    for stream in (1, 2, 1, 2):
        monkeypatch.setattr(module, "stream_id", lambda device, stream=stream: stream)
        batch_anchors(generator, *case())
    assert len(made) == 2


def test_changes_are_seen(generator, made):
    first = batch_anchors(generator, *case()).clone()
    generator.cell_anchors[0].add_(1)
    moved = batch_anchors(generator, *case())
    assert not torch.equal(first, moved)
    generator.cell_anchors = [cell - 1 for cell in generator.cell_anchors]
    assert torch.equal(batch_anchors(generator, *case())[: 8 * 13 * 6], first[: 8 * 13 * 6])
    again = batch_anchors(generator, *case())
    kept = again.clone()
    again.zero_()  # by a caller
    assert torch.equal(batch_anchors(generator, *case()), kept)
    assert len(made) == 4


def test_few_sizes_are_kept(generator, made):
    for width in range(100, 140):
        batch_anchors(generator, *case(width=width))
    assert len(module._CACHES[generator]) == module._KEPT
    batch_anchors(generator, *case(width=139))
    assert len(made) == 40
    batch_anchors(generator, *case(width=100))
    assert len(made) == 41


def test_what_inference_made_serves_training(generator):
    with torch.inference_mode():
        batch_anchors(generator, *case())
    anchors = batch_anchors(generator, *case())
    (anchors * torch.ones(1, requires_grad=True)).sum().backward()
    with torch.inference_mode():  # and a generator whose own tensors are inference's
        generator.cell_anchors = [cell + 1 for cell in generator.cell_anchors]
        batch_anchors(generator, *case())
    assert not batch_anchors(generator, *case()).is_inference()


@pytest.mark.parametrize(
    ("builder", "levels"),
    [("resnet18_fpn", 5), ("resnet18_fpn_v2", 5), ("resnet18_fpn_lite", 4), ("spinenet49s", 5)],
)
def test_builders_take_anchors_as_plain_data(builder, levels):
    anchors: Any = {"sizes": [[20 * 2**level, 25 * 2**level] for level in range(levels)], "ratios": [1.0, 1.5]}
    with torch.device("meta"):
        model = MODELS[f"retinanet_{builder}"](num_classes=3, weights_backbone=None, anchors=anchors)
    assert model.anchor_generator.sizes == tuple(map(tuple, anchors["sizes"]))
    assert model.head.classification_head.cls_logits.out_channels == 4 * 3
    assert model.head.regression_head.bbox_reg.out_channels == 4 * 4


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ({"sizes": [[8]]}, "must be a dictionary of sizes and ratios"),
        ({"sizes": [[8], [16, 20]], "ratios": [1.0]}, "equally many sizes in each level"),
        ({"sizes": [], "ratios": [1.0]}, "equally many sizes"),
        ({"sizes": [[8], [16]], "ratios": []}, "must have a ratio"),
        ({"sizes": [[8], [-16]], "ratios": [1.0]}, "must be positive and finite"),
        ({"sizes": [[8], [16]], "ratios": [float("nan")]}, "must be positive and finite"),
    ],
)
def test_anchors_that_are_none(anchors, message):
    with pytest.raises(ValueError, match=message):
        generator_of(anchors)


@pytest.mark.parametrize(
    ("builder", "levels"), [("resnet18_fpn", 5), ("resnet18_fpn_v2", 5), ("resnet18_fpn_lite", 4), ("spinenet49s", 5)]
)
def test_builders_refuse_anchors_of_another_number_of_levels(builder, levels):
    message = f"anchors must have sizes for the {levels} levels of the backbone, got 3"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MODELS[f"retinanet_{builder}"](weights_backbone=None, anchors={"sizes": [[8], [16], [32]], "ratios": [1.0]})


def test_the_published_weights_have_their_own_anchors():
    with pytest.raises(ValueError, match="give weights or anchors, not both"):
        MODELS["retinanet_resnet50_fpn_v2"](weights="COCO_V1", anchors={"sizes": [[8]] * 5, "ratios": [1.0]})

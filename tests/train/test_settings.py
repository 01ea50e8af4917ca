"""The recipe, the data and the machine decide where a person leaves a choice open."""

import json
from dataclasses import replace
from typing import Any

import pytest

from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.device import has_bfloat16
from retina_fast.losses import AtssMatcher
from retina_fast.train import TrainSettings
from retina_fast.train.start import starting_network

LITE, OTHER = "retinanet_resnet18_fpn_lite", "retinanet_resnet50_fpn"


@pytest.fixture
def data(shapes) -> CocoDataset:
    """Six images, two of which have no object."""
    content = json.loads(shapes[0].read_text())
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] < 4]
    shapes[0].write_text(json.dumps(content))
    return CocoDataset(*shapes)


def test_what_is_left_open_is_the_recipes_and_the_machines(data, device):
    settings = TrainSettings(LITE).resolve(data)
    assert (settings.steps, settings.batch_size, settings.lr, settings.crop) == (6000, 4, 2e-3, 256)
    assert (settings.bf16, settings.weights_backbone) == (has_bfloat16(device), "none")
    settings = TrainSettings(OTHER, recipe="torchvision-v1", batch_size=2).resolve(data)
    assert (settings.steps, settings.lr, settings.crop) == (26 * 2, 0.01 / 8, 0)  # of the four images with objects
    assert settings.weights_backbone == "IMAGENET1K_V1"


def test_crops_are_for_models_that_scale_images_by_a_factor(data):
    crops = [TrainSettings(OTHER, image_scale=scale).resolve(data).crop for scale in (None, 1.25)]
    assert crops == [0, 256]


def test_a_choice_stays_as_it_is_and_resolving_again_changes_nothing(data):
    given: dict[str, Any] = {
        "steps": 7,
        "batch_size": 3,
        "lr": 0.0,
        "crop": 0,
        "bf16": False,
        "weights_backbone": "none",
    }
    settings = TrainSettings(OTHER, recipe="torchvision-v1", **given).resolve(data)
    assert {name: getattr(settings, name) for name in given} == given
    for other in (settings, TrainSettings(LITE).resolve(data)):
        assert other.resolve(data) == other


def test_a_backbones_weights_and_a_model_file_exclude_each_other(data):
    settings = TrainSettings(OTHER, weights_backbone="IMAGENET1K_V1")
    with pytest.raises(UserError, match="--weights-backbone and --checkpoint exclude each other"):
        settings.resolve(data, "model.pt")
    assert replace(settings, weights_backbone="none").resolve(data, "model.pt").weights_backbone == "none"
    assert TrainSettings(OTHER, recipe="torchvision-v1").resolve(data, "model.pt").weights_backbone == "IMAGENET1K_V1"


def test_matchers_and_losses_reach_the_builder(data):
    chosen = {"matcher": "atss", "classification_loss": "varifocal", "box_loss": "giou", "reg_max": 5}
    chosen["box_weights"] = "quality"
    settings = TrainSettings(LITE, arguments=chosen).resolve(data)
    network, about = starting_network(settings, data)
    assert network.head.regression_head.bbox_reg.out_channels == 9 * 4 * 6
    assert network.proposal_matcher == AtssMatcher()
    assert {name: about.kwargs[name] for name in chosen} == chosen
    for name in chosen:
        with pytest.raises(UserError, match=f"{name} must be .*, got 'best'"):
            TrainSettings(LITE, arguments={name: "best"})


def test_anchors_are_fitted_to_the_data(data):
    settings = TrainSettings(LITE, anchors="auto", image_scale=2.0).resolve(data)
    network, about = starting_network(settings, data)
    anchors = about.kwargs["anchors"]
    assert network.anchor_generator.sizes == tuple(map(tuple, anchors["sizes"]))
    assert network.head.classification_head.num_anchors == 1
    other, _ = starting_network(replace(settings, image_scale=2**1.5), data)  # half an octave, of two, further
    ratios = {(b / a) for (a,), (b,) in zip(anchors["sizes"], other.anchor_generator.sizes, strict=True)}
    assert min(ratios) > 1.3 or max(ratios) < 0.77
    again, _ = starting_network(settings, data, resumed=about.kwargs)  # no fit: the run's own
    assert again.anchor_generator.sizes == network.anchor_generator.sizes
    with pytest.raises(UserError, match="--anchors and --checkpoint exclude each other"):
        starting_network(settings, data, "model.pt")
    with pytest.raises(UserError, match=r"anchors must be auto, .*, got 'mine'"):
        TrainSettings(LITE, anchors="mine")


def test_anchors_need_a_box(data):
    data.coco["annotations"].clear()
    with pytest.raises(UserError, match=r"has no box that anchors could be fitted to: leave out --anchors"):
        starting_network(TrainSettings(LITE, anchors="auto").resolve(data), data)

"""Extractors of timm of several families, built without a network."""

import re
from typing import Any

import pytest
import torch

from retina_fast import RetinaNet
from retina_fast.backbones.timm import timm_fpn

MODELS: dict[str, dict[str, Any]] = {
    # a plain CNN, a ConvNeXt, mobile CNNs, a hybrid of convolution and attention, a transformer with NHWC maps
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "coatnet_pico_rw_224": {"img_size": 128},
    "swin_tiny_patch4_window7_224": {"img_size": 128, "embed_dim": 24, "depths": (1, 1, 1, 1)},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pytest.importorskip("timm")
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("p6_from_c5", [False, True])
def test_levels_and_training(name, p6_from_c5):
    backbone = timm_fpn(name, out_channels=8, p6_from_c5=p6_from_c5, **MODELS[name])
    model = RetinaNet(backbone, num_classes=3, min_size=128, max_size=128)
    levels = backbone(torch.rand(2, 3, 128, 128))
    assert [tuple(level.shape) for level in levels.values()] == [(2, 8, n, n) for n in (16, 8, 4, 2, 1)]
    target = {"boxes": torch.tensor([[10.0, 10, 90, 100]]), "labels": torch.tensor([2])}
    losses = model([torch.rand(3, 128, 128)] * 2, [target] * 2)
    torch.stack([*losses.values()]).sum().backward()
    first = next(p for p in backbone.body.parameters() if p.ndim == 4)
    assert first.grad is not None
    assert first.grad.any()
    assert model.uses_fast_losses()
    assert len(model.eval()([torch.rand(3, 128, 100)])) == 1


def test_images_of_any_size():
    levels = timm_fpn("test_convnext", out_channels=8)(torch.rand(1, 3, 160, 224))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]


@pytest.mark.parametrize(("name", "strides"), [("vit_tiny_patch16_224", [16, 16, 16]), ("levit_128s", [16, 32, 64])])
def test_a_model_without_these_strides_is_named(name, strides):
    with pytest.raises(ValueError, match=re.escape(f"strides 8, 16 and 32, those of {name} have {strides}")):
        timm_fpn(name)


def test_an_unknown_name_is_timms_error():
    with pytest.raises(RuntimeError, match="resnet51000"):
        timm_fpn("resnet51000")

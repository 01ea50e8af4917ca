"""BatchNorm folded into convs: where it may be, where it must not, and that nothing else changes."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from retina_fast import builders, compile_inference
from retina_fast.backbones import frozen_norm
from retina_fast.deploy.fusion.fold import count_norms, fold_batch_norm


def with_statistics(model):
    """BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name in ("running_mean", "running_var", "weight", "bias"):
                values = getattr(module, name)
                if values is not None:
                    values.data = 0.5 + torch.rand(values.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def folded_and_change(model, x):
    """How many norms were folded, of how many, and the largest change of the output."""
    norms, before = count_norms(model), model(x)
    folded = fold_batch_norm(model, lambda: [model(x)])
    assert count_norms(model) == norms - folded
    return folded, norms, float((model(x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, frozen_norm.FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_kinds_of_norm(norm):
    model = with_statistics(Conv2dNormActivation(3, 6, norm_layer=norm, bias=True, groups=3))
    folded, norms, change = folded_and_change(model, torch.rand(2, 3, 9, 9))
    assert folded == norms == 1
    assert change < 1e-6


def test_a_norm_without_weights():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    assert folded_and_change(model, torch.rand(1, 3, 9, 9))[::2] == (1, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_resnext50_32x4d_fpn_v2"])
def test_every_norm_of_a_trunk_is_folded(name):
    model = with_statistics(builders.MODELS[name](num_classes=2, weights_backbone=None))
    trunk = model.backbone
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = list(trunk(x).values())
        norms = count_norms(model)
        assert fold_batch_norm(model, lambda: list(trunk(x).values())) == norms > 15
        for old, new in zip(before, trunk(x).values(), strict=True):
            assert (new - old).norm() < 1e-5 * old.norm()


@pytest.mark.parametrize(("name", "norms"), [("retinanet_resnet18_fpn", 20), ("retinanet_resnet50_fpn", 53)])
def test_every_norm_of_a_pretrained_model_is_folded(name, norms):
    """Such a model has frozen norms of this package's own class."""
    model = with_statistics(builders.MODELS[name](num_classes=2, weights_backbone="IMAGENET1K_V1", _fetch=False))
    assert f"BatchNorm folded into convs: {norms} of {norms}" in str(compile_inference(model, dtype=torch.float32))


def test_outputs_are_compared_without_tf32(monkeypatch):
    """On a GPU its error of 1.7e-3 would exceed what folding may change."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, seen = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), []

    def run():
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return [model(torch.ones(1, 3, 9, 9))]

    with torch.no_grad():
        assert fold_batch_norm(model, run) == 1
    assert seen == [(False, False)] * 2
    assert torch.backends.cudnn.allow_tf32


class Branching(nn.Module):
    """The conv's output is used past the norm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class Shared(Branching):
    """One conv, two norms, as heads have that share convs between levels."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(x * 2))


class Between(Branching):
    def forward(self, x):
        return self.norm(self.conv(x).relu_())


class Before(Branching):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x))


class Twice(Branching):
    """Both called twice, always one after the other: foldable."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(2 * x))


@pytest.mark.parametrize(("module", "foldable"), [(Branching, 0), (Shared, 0), (Between, 0), (Before, 0), (Twice, 1)])
def test_what_may_be_folded(module, foldable):
    folded, _, change = folded_and_change(with_statistics(module()), torch.rand(1, 3, 9, 9))
    assert folded == foldable
    assert change < 1e-6


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_with_a_hook_is_left_alone(part):
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    seen = []
    model[part].register_forward_hook(lambda *_: seen.append(1))
    assert folded_and_change(model, torch.rand(1, 3, 9, 9))[0] == 0
    assert seen


def test_a_norm_without_running_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert folded_and_change(model, torch.rand(1, 3, 9, 9))[0] == 0

"""Convs fused with what follows them: where they may be, where they must not, and that the results stay."""

import copy
import pickle
import re
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, resnet18
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

from retina_fast import builders, compile_inference, retinanet_resnet18_fpn
from retina_fast.backbones.spinenet import Residual, SpineNet
from retina_fast.deploy.fusion import layers
from retina_fast.deploy.fusion.blocks import FusedSpineNet
from retina_fast.deploy.fusion.fold import fold_batch_norm
from retina_fast.deploy.fusion.fuse import count_convs, fuse_convs
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.forward import run_convs
from retina_fast.kernels.conv_onednn import serves_dtype
from tests.deploy.engine_soak import small_model
from tests.deploy.fusion.fusing import X4, chain, error, fused_count
from tests.deploy.fusion.test_fold import with_statistics
from tests.deploy.pictures import images
from tests.instruments.fake_gpu import TorchOp, gpu_work_of

pytestmark = pytest.mark.usefixtures("one_thread")


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def outputs(model, x):
    features, returned = run_convs(model, x)
    return [*features, *(level for output in returned.values() for level in output)]


def folded(name, size=64):
    """A model whose norms are folded, and an image for it."""
    torch.manual_seed(0)
    model = with_statistics(builders.MODELS[name](num_classes=3, weights=None, weights_backbone=None))
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        fold_batch_norm(model, lambda: outputs(model, x))
    return model, x


# Equal to what they were

MORE = "18_fpn$|34|resnext.*fpn$|101|152"  # of the blocks that others have
BUILDERS = [
    pytest.param(name, marks=pytest.mark.slow if re.search(MORE, name) else ())
    for name in builders.MODELS
    if "spinenet" not in name or name.endswith(("49s", "49xs_mobile"))
]


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_every_builder_in_float32(name):
    model, x = folded(name)
    before = outputs(model, x)
    assert fuse_convs(model, lambda: outputs(model, x)) == count_convs(model)
    for ours, theirs in zip(outputs(model, x), before, strict=True):
        assert error(ours, theirs) < 1e-5


WINOGRAD_BUILDERS = [
    "retinanet_resnet50_fpn_v2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet_resnet18_fpn", "retinanet_spinenet49s")),
]


@pytest.mark.skipif(not serves_dtype(torch.float32), reason="this build has no fused oneDNN convs")
@pytest.mark.parametrize("name", WINOGRAD_BUILDERS)
@torch.no_grad()
def test_winograds_algorithm_wherever_it_can_be(name, monkeypatch):
    model, x = folded(name, 128)
    before = outputs(model, x)
    calls: list[int] = []
    fuse_convs(model, lambda: outputs(model, x))
    monkeypatch.setattr(layers, "gains_from_winograd", lambda *_: not calls.append(1))
    for ours, theirs in zip(outputs(model, x), before, strict=True):
        assert error(ours, theirs) < 1e-5
    assert len(calls) > 30


def test_large_convs_of_an_engine_run_by_winograds_algorithm(monkeypatch):
    """Those of the towers at the level of 52x52, and whatever the weights are changed to."""
    model: Any = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    calls, run_winograd = [], FusedConv.run_winograd

    def recorded(*args):
        calls.append(1)
        return run_winograd(*args)

    monkeypatch.setattr(FusedConv, "run_winograd", recorded)
    x = torch.randn(1, 128, 52, 52)
    with torch.no_grad():
        fuse_convs(model, lambda: model(x))
        for _ in range(2):
            exact = nn.functional.conv2d(x.double(), model[0].weight.double(), model[0].bias.double(), padding=1).relu()
            assert error(model(x), exact) < 2e-6
            model[0].weight.mul_(3)
        assert len(calls) == 2
        model(x[:, :, :16, :16])
    assert model(x).requires_grad
    assert len(calls) == 2
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.skipif(not serves_dtype(torch.bfloat16), reason="this processor has no bfloat16")
@pytest.mark.parametrize(
    "name", ["retinanet_resnet18_fpn", "retinanet_resnext50_32x4d_fpn_v2", "retinanet_spinenet49s"]
)
@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_unfused(name):
    model, x = folded(name, 128)
    exact = outputs(model, x)
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    unfused = outputs(half, x.bfloat16())
    fuse_convs(half, lambda: outputs(half, x.bfloat16()))
    for ours, theirs, right in zip(outputs(half, x.bfloat16()), unfused, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        chance = 2 if len(right.flatten()) < 128 else 1.2  # the errors of few values differ by chance
        assert error(ours, right) < chance * error(theirs, right) + 2**-9


@torch.no_grad()
def test_an_activation_that_a_sum_of_onednn_does_not_know():
    conv = partial(Conv2dNormActivation, norm_layer=None, activation_layer=nn.SiLU)
    block = nn.Sequential(Residual(conv, "bottleneck", 8, 4, 0.2), Residual(conv, "residual", 16, 8, 0.0)).eval()
    count, activations = fused_count(block, torch.randn(2, 8, 9, 7))
    assert (count, activations.count("swish")) == (7, 5)


@torch.no_grad()
def test_links_of_spinenet_and_a_hook_on_one():
    torch.manual_seed(0)
    model, seen = SpineNet(width=0.1).eval(), []
    x, rows = torch.rand(1, 3, 128, 128), len(model.specification)
    fold_batch_norm(model, lambda: list(model(x).values()))
    links: Any = model.links
    link = links[3][1]
    link.register_forward_hook(lambda *args: seen.append(args[-1].clone()))
    before = model(x)
    fuse_convs(model, lambda: model(x))
    after = model(x)
    assert all(error(after[name], level) < 1e-5 for name, level in before.items())
    assert sorted(cast(FusedSpineNet, model).fused_rows) == [row for row in range(rows) if row != 3]
    assert len(seen) == 3
    assert error(seen[2], seen[0]) < 1e-5


def test_gradients_flow_through_fused_convs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    before = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    fuse_convs(model, lambda: model(x))
    after = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(after, before)


# What is fused


@torch.no_grad()
def test_no_activation_and_sum_is_left_in_a_v1_model():
    model, x = folded("retinanet_resnet18_fpn", 128)
    calls = []
    fuse_convs(model, lambda: outputs(model, x))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: calls.append(1))
    outputs(model, x)
    assert not calls
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    assert all(type(block) is not BasicBlock for block in blocks)
    assert all(block.downsample is None or block.downsample[0].bias is None for block in blocks)
    assert type(model.backbone.fpn) is not FeaturePyramidNetwork
    relus = [module.activation for module in model.modules() if isinstance(module, FusedConv)].count("relu")
    assert relus == 1 + 2 * len(blocks) + 8  # the stem, the blocks and the towers


@torch.no_grad()
def test_what_may_be_overwritten():
    """An identity that a downsampling conv, or the fused block before, has made and nobody else holds."""
    model, x = folded("retinanet_resnet18_fpn")
    body = model.backbone.body
    held = []
    body.layer3[0].register_forward_hook(lambda *args: held.append((args[-1], args[-1].clone())))
    fuse_convs(model, lambda: outputs(model, x))
    flags = [[getattr(block, "may_overwrite", None) for block in body[f"layer{n}"]] for n in (1, 2, 3)]
    assert flags == [[False, True], [True, True], [None, False]]
    outputs(model, x)
    assert all(torch.equal(output, copied) for output, copied in held)


@torch.no_grad()
def test_parameters_keep_their_names():
    model, x = folded("retinanet_resnet18_fpn")
    names = [name for name, _ in model.named_parameters()]
    fuse_convs(model, lambda: outputs(model, x))
    gone = {name for name in names if name not in dict(model.named_parameters())}
    assert all("downsample" in name and name.endswith("bias") for name in gone)


def test_the_launches_of_a_fused_model_on_a_gpu():
    """Recorded on fake CUDA tensors: the residual blocks and towers are convs, each with one pass behind it."""

    def prepare():
        with torch.device("cuda"):
            layer = resnet18(norm_layer=lambda channels: nn.Identity()).layer2
            tower = RetinaNetHead(256, 9, 3).classification_head.conv
            x, level = (channels_last(torch.ones(1, channels, 8, 8)) for channels in (64, 256))
        for conv in (module for part in (layer, tower) for module in part.modules() if isinstance(module, nn.Conv2d)):
            conv.weight = nn.Parameter(channels_last(conv.weight.detach()))
        fuse_convs(layer, lambda: layer(x))
        fuse_convs(tower, lambda: tower(level))
        return layer.eval(), tower, x, level

    @torch.no_grad()
    def call(prepared):
        layer, tower, x, level = prepared
        layer(x)
        tower(level)

    steps = gpu_work_of(call, prepare)
    names = [step.name if isinstance(step, TorchOp) else step.kernel.__name__ for step in steps]
    assert names == ["convolution", *["convolution", "_conv_epilogue_kernel"] * 8]


# Live


@torch.no_grad()
def test_changed_weights_count_and_copies_work():
    model = chain()
    fuse_convs(model, lambda: model(X4))
    for change in ("in place", "new tensor", "dtype"):
        before = model(X4.to(model[0].weight.dtype))
        if change == "in place":
            model[0].weight.mul_(3)
        elif change == "new tensor":
            model[0].weight = nn.Parameter(model[0].weight * 3)
        else:
            model.bfloat16()
        x = X4.to(model[0].weight.dtype)
        expected = nn.functional.conv2d(x, model[0].weight, model[0].bias, padding=1).relu()
        assert error(model(x), expected) < 2**-7
        assert change == "dtype" or error(model(x), before) > 0.1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


# In the engine


def test_the_engine_says_how_many(device):
    engine = compile_inference(small_model(), dtype=torch.float32)
    convs = count_convs(engine.model)
    assert engine.report.fused == engine.report.convs == convs > 10
    assert f"convs fused with what follows them: {convs} of {convs}" in str(engine)
    engine(images((40, 50)))


@torch.no_grad()
def test_a_hook_of_the_users_is_called_by_the_engine():
    model, seen = retinanet_resnet18_fpn(num_classes=2, weights_backbone=None, min_size=64, max_size=64), []
    model.backbone.body.layer2[0].conv2.register_forward_hook(lambda *_: seen.append(1))
    engine = compile_inference(model.eval(), dtype=torch.float32)
    seen.clear()
    engine(images((64, 64)))
    assert len(seen) == 1
    assert engine.report.fused == engine.report.convs - 1

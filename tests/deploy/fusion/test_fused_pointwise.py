"""Fused 1x1 convs as products of matrices: residual blocks with their shortcuts, and pyramids."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FeaturePyramidNetwork

from retina_fast.deploy.fusion.blocks import FusedBottleneck
from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.tuned import Chooser, choose_ways
from tests.deploy.fusion.fusing import error
from tests.instruments.fake_gpu import TorchOp, gpu_work_of, names_in_bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def blocks(kind=Bottleneck, width=8, **options):
    """Two residual blocks, the first of which has a downsampling conv."""
    torch.manual_seed(0)
    none = {"norm_layer": lambda channels: nn.Identity()}
    out = kind.expansion * width
    down = nn.Sequential(conv1x1(16, out, 2), nn.Identity())
    chain = nn.Sequential(kind(16, width, 2, down, **none, **options), kind(out, width, **none, **options))
    for module in chain.modules():
        if isinstance(module, nn.Conv2d):  # as a folded norm leaves it
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    return chain.eval()


@pytest.fixture
def pointwise(monkeypatch):
    """1x1 convs run so on a CPU, too, where the kernel's reference stands in."""
    monkeypatch.setattr(
        FusedConv,
        "takes_pointwise",
        lambda conv, x, z, other: conv.is_pointwise() and (other is None or other.is_pointwise()),
    )


@torch.no_grad()
def both_ways(model, x):
    """What a model gives before it is fused, and afterwards in each way that all its 1x1 convs may run in."""
    before = model(x)
    fuse_convs(model, lambda: model(x))
    convs = [module for module in model.modules() if isinstance(module, FusedConv)]
    yield before, model(x)
    shapes = []
    handles = [
        conv.register_forward_pre_hook(lambda conv, args: shapes.append((conv, args[0].shape))) for conv in convs
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for conv, shape in shapes:
        conv.ways = {shape: "pointwise"} if conv.is_pointwise() else {}
    assert {conv.is_pointwise() for conv in convs} == {True, False}
    yield before, model(x)


@pytest.mark.parametrize("options", [{}, {"kind": BasicBlock}, {"groups": 2, "base_width": 64}, {"width": 4}])
def test_residual_blocks(options, pointwise):
    model, x = blocks(**options).double(), torch.randn(2, 16, 9, 7).double()
    for before, after in both_ways(model, x):
        assert error(after, before) < 1e-12
    assert [block.merges_downsample for block in model] == [True, False]


def test_a_pyramid_of_odd_sizes(pointwise):
    torch.manual_seed(0)
    pyramid = FeaturePyramidNetwork([8, 16, 24, 4], 12).eval().double()
    sides = [(25, 14), (13, 7), (7, 3), (2, 2)]
    maps = {str(i): torch.randn(2, (8, 16, 24, 4)[i], *sides[i]).double() for i in range(4)}
    for before, after in both_ways(pyramid, maps):
        assert all(error(after[name], before[name]) < 1e-12 for name in before)


@torch.no_grad()
def test_a_hook_on_the_downsampling_chain_is_called():
    model, x, calls = blocks(), torch.randn(1, 16, 6, 6), []
    model[0].downsample.register_forward_hook(lambda *_: calls.append(1))
    before = model(x)
    fuse_convs(model, lambda: model(x))
    assert type(model[0]) is FusedBottleneck
    assert not model[0].merges_downsample
    calls.clear()
    assert error(model(x), before) < 1e-5
    assert calls == [1]


@torch.no_grad()
def test_choices_are_of_the_whole_sum(tmp_path, pointwise, monkeypatch):
    """Each 1x1 conv is offered the way, and a shortcut is no choice of its own."""
    model, x = blocks().double(), channels_last(torch.randn(1, 16, 6, 6).double())
    before = model(x)
    fuse_convs(model, lambda: model(x))
    layers = []

    def last_way(chooser, layer, ways, definitions=None):
        layers.append(layer)
        return list(ways)[-1]

    monkeypatch.setattr(Chooser, "choose", last_way)
    counts = choose_ways(model, lambda: model(x), Chooser(tmp_path / "choices.json", torch.device("cpu")))
    assert counts == {"pointwise": 4, "eager": 2}
    assert "sum with conv 32x16x1x1 stride (2, 2) of 1x16x6x6 + relu" in layers[2]
    assert len(set(layers)) == len(layers) == 6
    assert error(model(x), before) < 1e-12


@torch.no_grad()
def test_the_launches_of_blocks_and_a_pyramid_on_a_gpu(monkeypatch):
    """On fake CUDA tensors of bfloat16, with that way wherever it is offered: no pass over an output, no copy of a
    level above. A float32 conv is not offered it."""

    def prepare():
        with torch.device("cuda"):
            chain, pyramid = blocks(width=16), FeaturePyramidNetwork([16, 64], 16).eval()
            x = channels_last(torch.ones(1, 16, 8, 8))
            fuse_convs(chain, lambda: chain(x))
            fuse_convs(pyramid, lambda: pyramid({"0": x, "1": chain(x)}))
            assert "pointwise" not in chain[0].conv1.possible_ways(x.float(), None)
            return chain, pyramid, x

    def call(prepared):
        chain, pyramid, x = prepared
        pyramid({"0": x, "1": chain(x)})

    def run(conv, x, z=None, overwrite_z=False, shortcut=None):
        ways = conv.possible_ways(x, z, shortcut)
        return conv.run("pointwise" if "pointwise" in ways else "epilogue", x, z, overwrite_z, shortcut)

    monkeypatch.setattr(FusedConv, "forward", run)
    names = names_in_bfloat16(call, prepare)
    one, three = "_conv_pointwise_kernel", ["convolution", "_conv_epilogue_kernel"]
    assert names == [*[one, *three, one] * 2, one, *three, one, *three]


@torch.no_grad()
def test_a_shortcut_that_is_not_merged_is_a_conv_and_no_more():
    """On fake CUDA tensors of float32: its bias is the last conv's, and nothing passes over its output."""

    def prepare():
        with torch.device("cuda"):
            chain, x = blocks(), channels_last(torch.ones(1, 16, 8, 8))
            fuse_convs(chain, lambda: chain(x))
            return chain[0], x

    work = gpu_work_of(lambda prepared: prepared[0](prepared[1]), prepare)
    names = [step.name if isinstance(step, TorchOp) else step.kernel.__name__ for step in work]
    assert names == ["convolution", "_conv_epilogue_kernel"] * 2 + ["convolution"] * 2 + ["_conv_epilogue_kernel"]

"""Bottlenecks in a row: the end of one and the first conv of the next as one kernel."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, conv1x1

from retina_fast.deploy.fusion import tail as module
from retina_fast.deploy.fusion.blocks import tails_of
from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.deploy.fusion.tail import FusedTail
from retina_fast.deploy.tuned import Chooser, choose_ways
from retina_fast.kernels.conv_chain import conv_chain
from tests.deploy.fusion.fusing import error
from tests.instruments.fake_gpu import names_in_bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


def stages(width=16):
    """Two stages of two blocks, the first of which begins with a shortcut of stride 1 and the second with stride 2; the
    output of either is returned."""
    torch.manual_seed(0)
    none = {"norm_layer": lambda channels: nn.Identity()}

    def stage(into, width, stride):
        out = 4 * width
        down = nn.Sequential(conv1x1(into, out, stride), nn.Identity())
        return nn.Sequential(Bottleneck(into, width, stride, down, **none), Bottleneck(out, width, **none))

    layers = OrderedDict(layer1=stage(width, width, 1), layer2=stage(4 * width, 2 * width, 2))
    model = IntermediateLayerGetter(nn.Sequential(layers), {"layer1": "0", "layer2": "1"})
    for part in model.modules():
        if isinstance(part, nn.Conv2d):  # as a folded norm leaves it
            part.bias = nn.Parameter(torch.randn(part.out_channels))
    return model.eval()


def image(dtype=torch.float64):
    return torch.randn(2, 16, 9, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def on_cpu(monkeypatch):
    """Tails run in all ways on a CPU, too, where the kernel's reference stands in."""

    def ways(tail, x, z, shortcut):
        return ["apart"] if z.shape[2:] != tail.convs[0].output_shape(x)[2:] else ["apart", "paired", "whole"]

    monkeypatch.setattr(FusedTail, "possible_ways", ways)


@torch.no_grad()
def fused(model, x):
    before = model(x)
    fuse_convs(model, lambda: model(x))
    return before


SHAPES = (2, 16, 9, 7), (2, 32, 9, 7), (2, 32, 5, 4)


def run_all(model, way):
    for tail in tails_of(model):
        tail.ways = {torch.Size(shape): way for shape in SHAPES}


@pytest.mark.parametrize("way", ["apart", "paired", "whole"])
@torch.no_grad()
def test_convs_in_a_row_give_what_the_convs_gave(way, on_cpu, monkeypatch):
    """Within a stage and from one stage to the next. With a shortcut of stride 2 they stay apart."""
    model, x, calls = stages().double(), image(), []
    before = fused(model, x)
    names = set(model.state_dict())
    (a, b), (c, d) = model.layer1, model.layer2
    assert [tail.convs for tail in tails_of(model)] == [
        (first.conv2, first.conv3, second.conv1) for first, second in ((a, b), (b, c), (c, d))
    ]

    def call(*args):
        calls.append(args[-1] is not None)
        return conv_chain(*args)

    monkeypatch.setattr(module, "conv_chain", call)
    run_all(model, way)
    after = model(x)
    assert all(error(after[name], before[name]) < 1e-12 for name in before)
    assert calls == {"apart": [], "paired": [False, False], "whole": [True, True]}[way]
    assert set(copy.deepcopy(model).state_dict()) == set(model.state_dict()) == names


@torch.no_grad()
def test_a_copy_has_tails_of_its_own(on_cpu):
    model, x = stages().double(), image()
    before = fused(model, x)
    run_all(model, "paired")
    model(x)
    other = copy.deepcopy(model)
    model.layer1[1].conv1.weight.zero_()
    after = other(x)
    assert all(error(after[name], before[name]) < 1e-12 for name in before)
    assert tails_of(other)[0].convs[2] is other.layer1[1].conv1


@torch.no_grad()
def test_an_output_is_taken_once_and_unchanged(on_cpu):
    model, x = stages().double(), image()
    fused(model, x)
    run_all(model, "paired")
    first, second = model.layer1
    y = first(x)
    expected = second.conv1(y)
    assert first.tail.take(y.clone()) is None
    assert first.tail.take(y) is None
    y = first(x)
    torch.testing.assert_close(first.tail.take(y), expected)
    assert first.tail.take(y) is None
    y = first(x)
    y.mul_(2)  # as a hook of the user's may
    assert first.tail.take(y) is None


@pytest.mark.parametrize("hooked", ["layer1.1", "layer1.1.conv1", "layer1.0.conv3", "layer1.0.conv2"])
@torch.no_grad()
def test_parts_with_hooks_run_by_themselves(hooked, on_cpu):
    model, x, calls = stages().double(), image(), []
    model.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))
    before = fused(model, x)
    run_all(model, "whole")
    calls.clear()
    after = model(x)
    assert all(error(after[name], before[name]) < 1e-12 for name in before)
    assert calls == [1]
    assert getattr(model.layer1[0], "tail", None) is None
    assert model.layer2[0].tail is not None


@torch.no_grad()
def test_the_fastest_way_is_chosen(tmp_path, on_cpu, monkeypatch):
    model, x, layers = stages().double(), image(), []
    before = fused(model, x)

    def last_way(chooser, layer, ways, definitions=None):
        layers.append(layer)
        results = [way() for way in ways.values()]
        for result in results[1:] if isinstance(results[0], tuple) else []:
            for found, expected in zip(result, results[0], strict=True):
                torch.testing.assert_close(found, expected)
        return list(ways)[-1]

    monkeypatch.setattr(Chooser, "choose", last_way)
    counts = choose_ways(model, lambda: model(x), Chooser(tmp_path / "choices.json", torch.device("cpu")))
    assert (counts["tail whole"], sum(counts.values())) == (2, 12 + 2)
    assert [layer.rpartition(", conv ")[2] for layer in layers[-2:]] == ["16x64x1x1", "32x64x1x1"]
    assert all(tail.choose is None for tail in tails_of(model))
    again = choose_ways(model, lambda: model(x), Chooser(tmp_path / "choices.json", torch.device("cpu")))
    assert again == counts  # also of the convs that a tail ran: in another dtype their ways may be others
    after = model(x)
    assert all(error(after[name], before[name]) < 1e-12 for name in before)


@pytest.mark.parametrize(("way", "convs"), [("apart", 14), ("paired", 14 - 2 * 2 - 1), ("whole", 14 - 2 * 3 - 1)])
@torch.no_grad()
def test_the_launches_on_a_gpu(way, convs):
    """On fake CUDA tensors of bfloat16; merged shortcuts are part of a chain. Not in float32."""

    def prepare():
        with torch.device("cuda"):
            model, x = stages(), image(torch.bfloat16)
            fuse_convs(model, lambda: model(x))
            run_all(model, way)
            assert tails_of(model)[0].possible_ways(x.float(), x.float(), None) == ["apart"]
            return model, x

    names = names_in_bfloat16(lambda prepared: prepared[0](prepared[1]), prepare)
    assert names.count("_conv_chain_kernel") == {"apart": 0, "paired": 2, "whole": 2}[way]
    assert names.count("convolution") == convs

"""FP8 among the ways of a conv: what it is compared with, and what it launches on a GPU."""

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

from retina_fast import compile_inference
from retina_fast.deploy.eight_bits.float8 import calibrate_float8, float8_convs
from retina_fast.deploy.fusion import layers
from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.deploy.fusion.tail import FusedTail
from retina_fast.deploy.tuned import Chooser, choose_ways
from retina_fast.forward import run_convs
from tests.deploy.eight_bits.bottlenecks import Trunk, bottleneck_model
from tests.deploy.pictures import images
from tests.instruments.fake_gpu import names_in_bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return bottleneck_model()


@pytest.fixture
def pictures():
    return images(*[(40, 50)] * 8)


@torch.no_grad()
def calibrated(model, pictures):
    """The engine's model in bfloat16, and a batch."""
    own = compile_inference(model, dtype=torch.bfloat16).model
    calibrate_float8(own, pictures)
    x = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return own, x


@pytest.mark.parametrize("fault", [1.0, 1.05])
@torch.no_grad()
def test_a_way_is_held_against_the_simulation(fault, model, pictures, tmp_path, monkeypatch):
    """It is further from the exact result than a right way may be; with a scale that is wrong by 5% it is dropped."""
    own, x = calibrated(model, pictures)
    right = layers.conv_float8
    monkeypatch.setattr(layers, "conv_float8", lambda *given: right(*given) * fault)
    times = {"float8": 0.0}
    monkeypatch.setattr(Chooser, "_time", lambda self, way: times.get(way.args[0], 1.0))
    path = tmp_path / "choices.json"
    counts = choose_ways(own, lambda: run_convs(own, x), Chooser(path, CPU))
    assert counts["float8"] == (0 if fault > 1 else 8)  # the merged downsampling conv runs in its block's last
    known = next(iter(json.loads(path.read_text())["choices"].values()))
    assert sum(bool(re.search(r"torch.bfloat16 or float8 of [\d.]+ ", layer)) for layer in known) == 6
    calls = []

    def counted(*given):
        calls.append(1)
        return right(*given)

    monkeypatch.setattr(layers, "conv_float8", counted)
    run_convs(own, x)
    assert len(calls) == (0 if fault > 1 else 9)
    before = {conv: error(conv) for conv in float8_convs(own)[:1]}
    assert all(0.005 < value < 0.06 for value in before.values())


def error(conv):
    """How far FP8 is from the exact conv, in relative norm."""
    x = torch.randn(2, conv.in_channels, 6, 6, dtype=torch.bfloat16).relu()
    exact = conv.run("eager", x, None).float()
    return float((conv.run("float8", x, None).float() - exact).norm() / exact.norm())


@torch.no_grad()
def test_chains_are_held_against_exact_convs(model, pictures, tmp_path, monkeypatch):
    """Where the convs of a tail run in FP8, one kernel of bfloat16 is compared with convs of bfloat16."""
    own, x = calibrated(model, pictures)
    monkeypatch.setattr(
        FusedTail, "possible_ways", lambda tail, x, z, shortcut: ["apart", *["paired"] * (shortcut is None)]
    )
    monkeypatch.setattr(Chooser, "_time", lambda self, way: 0.0 if getattr(way, "args", [""])[0] == "float8" else 1.0)
    counts = choose_ways(own, lambda: run_convs(own, x), Chooser(tmp_path / "choices.json", CPU))
    assert counts["float8"] == 8
    checked = []
    right = Chooser._is_right

    def recorded(self, way, expected):
        checked.append(right(self, way, expected))
        return checked[-1]

    monkeypatch.setattr(Chooser, "_is_right", recorded)
    choose_ways(own, lambda: run_convs(own, x), Chooser(tmp_path / "others.json", CPU))
    assert checked[-1]
    assert all(checked)


@torch.no_grad()
def test_the_launches_on_a_gpu(monkeypatch):
    """On fake CUDA tensors of bfloat16: a 1x1 conv is a pass that rounds, a scaled product and a pass of ours; the rest
    is as before. The host waits for nothing."""

    def prepare():
        with torch.device("cuda"):
            trunk: Any = Trunk().eval()
            x = torch.ones(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
            for module in (trunk.stem, *trunk.chain, trunk.chain[0].downsample):  # as folded norms leave them
                for name, part in list(module.named_children()):
                    if isinstance(part, nn.BatchNorm2d):
                        setattr(module, name, nn.Identity())
            for part in trunk.modules():
                if isinstance(part, nn.Conv2d) and part.bias is None:
                    part.bias = nn.Parameter(torch.ones(part.out_channels))
            fuse_convs(trunk, lambda: trunk(x))
            for conv in float8_convs(trunk):
                conv.float8_factor, conv.always = 1.0, "float8"
            trunk(x)  # prepares the weights
            return trunk, x

    names = names_in_bfloat16(lambda prepared: prepared[0](prepared[1]), prepare)
    one, three = ["clamp", "_scaled_mm"], ["convolution", "_conv_epilogue_kernel"]
    relu = [*one, "_conv_epilogue_kernel"]
    assert names[: names.index("clamp") + len(relu)] == [*three, *relu]
    assert names.count("_scaled_mm") == names.count("clamp") == 9
    assert names.count("convolution") == 1 + 3 + 2

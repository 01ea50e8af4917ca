"""Convs on a CPU whose inputs are small: the packing that serves them, and when PyTorch's own conv is the faster."""

from unittest import mock

import pytest
import torch

from retina_fast.deploy.fusion import layers
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.kernels.conv_onednn import serves_dtype
from tests.deploy.fusion.fusing import error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not serves_dtype(torch.float32), reason="no fused convs of oneDNN"),
]


def conv(out, kernel=3):
    torch.manual_seed(0)
    return FusedConv(16, out, kernel, padding=kernel // 2).eval().requires_grad_(False)


def pixels(side, batch=1):
    return torch.rand(batch, 16, side, side).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("out", "kernel", "packings"), [(36, 3, 3), (36, 1, 1), (64, 3, 1)])
def test_weights_are_packed_for_outputs_of_few_rows(out, kernel, packings, monkeypatch):
    pack = mock.Mock(side_effect=layers.pack_weight)
    monkeypatch.setattr(layers, "pack_weight", pack)
    layer = conv(out, kernel)
    for side in (40, 30, 7, 4, 40, 7):
        x = pixels(side)
        assert error(layer.run_fused(x, None), layer.run_eager(x, None)) < 1e-5
    assert pack.call_count == packings


def test_small_work_is_pytorchs(monkeypatch):
    monkeypatch.setattr(layers, "_SMALL_WORK", 5 << 19)
    monkeypatch.setattr(FusedConv, "run", run := mock.Mock(return_value=torch.zeros(1)))
    small, wide = conv(24), FusedConv(256, 256, 3).eval().requires_grad_(False)
    for layer, x in (
        (small, pixels(8)), (small, pixels(40)), (small, pixels(8, batch=2)), (small, pixels(8).bfloat16()),
        (wide, torch.rand(1, 256, 4, 4)),
    ):  # fmt: skip
        layer(x)
    assert [call.args[0] for call in run.call_args_list] == ["eager", *["fused"] * 4]

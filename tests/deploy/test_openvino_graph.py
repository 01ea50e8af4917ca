"""Graphs in OpenVINO for shapes that come often and seldom: by a stand-in that counts, and by OpenVINO itself."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retina_fast.deploy import openvino_graph
from retina_fast.deploy.openvino_graph import OpenVinoGraph

pytest.importorskip("onnx")


class Core:
    """Graphs that add up the pixels; those of any shape are off by a share of the sum, or cannot be compiled."""

    off, broken = 0.0, False

    def __init__(self):
        self.compiled = []

    def read_model(self, content, weights):
        model = SimpleNamespace(shape=None)
        model.reshape = lambda shape: setattr(model, "shape", tuple(shape))
        return model

    def compile_model(self, model, device, options):
        if model.shape is None and Core.broken:
            raise RuntimeError("no such shape")
        self.compiled.append(model.shape)
        shape, factor = model.shape, 1 if model.shape else 1 + Core.off

        def run(pixels, share_inputs, share_outputs):
            assert shape in (None, pixels.shape)
            ran.append(shape)
            return [(factor * pixels.sum(axis=(1, 2))).astype(np.float32)]

        return run


ran: list[tuple[int, ...] | None] = []


@pytest.fixture
def graph(monkeypatch):
    """With a stand-in for OpenVINO; what it compiles is in ``graph.core.compiled``, and what runs in ``ran``."""
    ran.clear()
    monkeypatch.setattr(Core, "off", 0.0)
    monkeypatch.setattr(Core, "broken", False)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    made = OpenVinoGraph(b"")
    return SimpleNamespace(run=made, core=made._core)


def call(graph, side):
    pixels = np.random.default_rng(side).random((1, side, 8, 3), np.float32)
    (output,) = graph.run(pixels)
    np.testing.assert_allclose(output, pixels.sum(axis=(1, 2)), rtol=1e-5)
    return ran[-1]


def of(side):
    return (1, side, 8, 3)


def test_two_shapes_have_graphs_of_their_own_and_the_others_share_one(graph):
    for side in (32, 64, 32, 64, 32):
        assert call(graph, side) == of(side)
    assert graph.core.compiled == [of(32), of(64)]
    call(graph, 96)
    assert graph.core.compiled == [of(32), of(64), of(96), None]  # which gives the same as the one before
    for side in (128, 160, 128):
        assert call(graph, side) is None
    assert call(graph, 96) == of(96)
    assert len(graph.core.compiled) == 4


def test_a_shape_that_comes_often_gets_a_graph(graph):
    for side in (32, 64, 96):
        call(graph, side)
    found = [call(graph, 128) for _ in range(openvino_graph._OFTEN + 2)]
    assert found == [None] * openvino_graph._OFTEN + [of(128)] * 2
    assert graph.core.compiled.count(of(128)) == 1


def test_the_graph_used_longest_ago_goes_and_must_come_often_again(graph, monkeypatch):
    monkeypatch.setattr(openvino_graph, "_MOST", 3)
    monkeypatch.setattr(openvino_graph, "_OFTEN", 1)
    for side in (32, 64, 96, 32):
        call(graph, side)
    assert [call(graph, 128) for _ in range(3)] == [None, of(128), of(128)]
    assert [call(graph, side) for side in (32, 96)] == [of(32), of(96)]
    assert [call(graph, 64) for _ in range(3)] == [None, of(64), of(64)]
    assert len(graph.run._compiled) == 3


@pytest.mark.parametrize("wrong", ["off", "broken"])
def test_a_graph_of_any_shape_that_is_wrong_is_not_used(graph, monkeypatch, wrong):
    monkeypatch.setattr(Core, "off", 0.5)
    monkeypatch.setattr(Core, "broken", wrong == "broken")
    for side in (32, 64, 96):  # at the third the other is tried, after its own
        call(graph, side)
    for side in (96, 128, 160, 128):
        assert call(graph, side) == of(side)
    assert graph.core.compiled.count(None) == (wrong == "off")  # tried once
    assert [shape for shape in graph.core.compiled if shape] == [of(side) for side in (32, 64, 96, 128, 160)]


def test_pixels_that_are_not_finite_decide_nothing(graph):
    """Of NaN two graphs may give two codes."""
    for side in (32, 64):
        call(graph, side)
    graph.run(np.full(of(96), np.nan, np.float32))
    assert graph.core.compiled == [of(32), of(64), of(96)]
    call(graph, 96)
    assert graph.core.compiled[3:] == [None]
    assert call(graph, 128) is None


@pytest.mark.slow
@pytest.mark.parametrize("eight_bits", [False, True])
def test_openvino_gives_the_same_for_shapes_that_come_often_and_seldom(eight_bits):
    """Trunk and heads of a detector with GroupNorm, beside ONNX Runtime's."""
    pytest.importorskip("openvino")
    from retina_fast.deploy.eight_bits.quantize import Quantizer
    from retina_fast.deploy.onnx_network import RUNTIMES, trace
    from retina_fast.predict.load import TREES, load_model

    model = load_model(TREES)[0].cpu().eval().requires_grad_(False)
    proto = trace(model, 32)
    if eight_bits:
        proto = Quantizer(proto, (torch.randn(1, 3, 128, 128).numpy() for _ in range(4))).quantized()
    content = proto.SerializeToString()
    runs = {name: RUNTIMES[name](content) for name in ("OpenVINO", "ONNX Runtime")}
    for shape in ((128, 128), (96, 160), (160, 96), (128, 192), (192, 128)):
        pixels = np.random.default_rng(0).standard_normal((2, 3, *shape)).astype(np.float32)
        for ours, theirs in zip(*(run(pixels) for run in runs.values()), strict=True):
            assert np.abs(ours - theirs).mean() < (0.1 if eight_bits else 1e-4) * theirs.std()
    graph = runs["OpenVINO"]
    assert isinstance(graph, OpenVinoGraph)
    assert graph._of_any_shape
    assert len(graph._compiled) == 3

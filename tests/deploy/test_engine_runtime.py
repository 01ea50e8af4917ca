"""Engines whose trunk and heads another runtime runs: the same detections, and an honest report."""

import copy
import math
import pickle
from functools import partial
from operator import lt

import pytest
import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.retinanet import RetinaNetHead

from retina_fast import (
    RetinaNet,
    compile_inference,
    retinanet_resnet18_fpn,
    retinanet_resnet18_fpn_v2,
    retinanet_spinenet49s,
)
from retina_fast.backbones.timm import timm_fpn
from retina_fast.data.errors import UserError
from retina_fast.deploy import engine_runtime, onnx_network, plan
from retina_fast.deploy.eight_bits.agreement import compare
from retina_fast.deploy.eight_bits.quantize import Quantizer
from retina_fast.deploy.eight_bits.sieve import MARGIN, Sieve
from retina_fast.deploy.engine_runtime import BY_CELLS
from retina_fast.deploy.fusion.fold import conv_outputs, fold_batch_norm
from retina_fast.deploy.onnx_network import Network, trace
from retina_fast.deploy.report import pixels_of
from retina_fast.detections import detect_candidates
from retina_fast.device import _openmp
from retina_fast.forward import DELTAS, LOGITS, run_convs
from retina_fast.kernels.image_batch import image_batch
from retina_fast.predict.load import TREES, load_model
from tests.deploy.export.test_export import PHOTO, small
from tests.deploy.pictures import floats
from tests.deploy.pictures import images as pictures
from tests.instruments.agreement import spread
from tests.instruments.exported import crops


@pytest.fixture
def model():
    made = small(min_size=64, max_size=96, score_thresh=0.3)
    spread(made.head)
    return made


@pytest.fixture
def stand_in(monkeypatch, model):
    """A runtime that computes by PyTorch what the graph says, and another that fails."""

    class Proto:
        def SerializeToString(self):
            return b"graph"

    def runs(content):
        assert content == b"graph"
        levels = len(model.backbone(torch.zeros(1, 3, 64, 64)))

        @torch.no_grad()
        def run(pixels):
            outputs = conv_outputs(model, torch.from_numpy(pixels))[levels:]
            return [output.permute(0, 2, 3, 1).numpy() for output in outputs]

        return run

    def fails(content):
        raise ModuleNotFoundError("No module named 'other'")

    traced = []

    def trace(model, multiple):
        traced.append(multiple)
        return Proto()

    monkeypatch.setattr(engine_runtime, "trace", trace)
    monkeypatch.setattr(
        engine_runtime, "fastest", lambda runs: onnx_network.fastest({k: runs[k] for k in ("StandIn", "Other")})
    )
    for module in (engine_runtime, onnx_network):
        monkeypatch.setattr(module, "RUNTIMES", {"StandIn": runs, "Other": fails})
    return traced


def test_another_runtime_behind_the_same_engine(model, stand_in):
    given = pictures((64, 80), (60, 64))
    engine = compile_inference(model, given, dtype=torch.float32, try_runtimes=True)
    assert stand_in == [32]
    assert "trunk and heads by StandIn: at 64x96 StandIn " in str(engine)
    assert "Other was left out: ModuleNotFoundError: No module named 'other'" in str(engine)
    assert engine.report.difference
    assert engine.report.difference.scores < 1e-5
    with torch.no_grad():
        expected = model(floats(given))
    assert len(expected[0]["boxes"]) > 5
    plain = compile_inference(model, dtype=torch.float32)
    for twin in (engine, copy.deepcopy(engine), pickle.loads(pickle.dumps(plain))):
        for ours, theirs in zip(twin(given), expected, strict=True):
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
            torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-5)
            assert torch.equal(ours["labels"], theirs["labels"])
    with pytest.raises(TypeError, match=r"what StandIn runs stays in float32 on the CPU: compile the model anew"):
        engine.to(torch.float64)
    with pytest.raises(TypeError, match=r"what StandIn runs keeps its weights: load others into the model"):
        engine.load_state_dict(engine.state_dict())


def test_what_another_version_pickled_is_refused():
    network = Network(b"graph", "OpenVINO")
    twin = pickle.loads(pickle.dumps(network))
    assert vars(twin) == vars(network)
    state = network.__getstate__()
    del state["_counts"]
    with pytest.raises(ValueError, match="pickled by another version of retina_fast: compile the model anew"):
        twin.__setstate__(state)


class FlatHead(RetinaNetHead):
    """A user's own, which flattens its outputs."""

    def forward(self, features):
        return super().forward(features)


@pytest.mark.parametrize("own_head", [False, True])
def test_pytorch_computes_nothing_at_sizes_that_come_again(model, monkeypatch, own_head):
    """And at new ones only for heads whose outputs do not tell the features' sizes."""
    if own_head:
        model.head.__class__ = FlatHead

    def opened(content):
        @torch.no_grad()
        def run(pixels):
            returned = run_convs(model, torch.from_numpy(pixels))[1]
            levels = [level for name in (LOGITS, DELTAS) for level in onnx_network._levels(returned[name])]
            return [(level.permute(0, 2, 3, 1) if level.dim() == 4 else level).numpy() for level in levels]

        return run

    computed = []

    def noted(model, pixels):
        computed.append(tuple(pixels.shape))
        return run_convs(model, pixels)

    monkeypatch.setattr(onnx_network, "run_convs", noted)
    monkeypatch.setattr(onnx_network, "RUNTIMES", {"StandIn": opened})
    network = Network(b"", "StandIn")
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (1, 3, 64, 96)):
        pixels = torch.rand(shape)
        with torch.no_grad():
            features, returned = network(model, pixels)
            levels, expected = run_convs(model, pixels)
        assert [(len(level), *level.shape[2:]) for level in features] == [
            (len(level), *level.shape[2:]) for level in levels
        ]
        assert all(level.dtype == torch.float32 for level in features)
        for name in (LOGITS, DELTAS):
            assert isinstance(returned[name], torch.Tensor) == own_head
            for ours, theirs in zip(returned[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs)
    once = [(1, 3, 32, 32)]
    assert computed == ([*once, (1, 3, 64, 96), (1, 3, 96, 64)] if own_head else once)


@pytest.mark.skipif(_openmp() is None, reason="no OpenMP")
@pytest.mark.parametrize(("few", "threads"), [(2**23, 1), (64 * 96 * 3, 2)])
def test_few_images_are_prepared_by_one_thread_before_another_runtime_starts(
    model, stand_in, monkeypatch, few, threads
):
    """Their values count as they are given and as the batch has them; the threads of a PyTorch engine stay."""
    given, noted = pictures((64, 80)), []

    def prepared(*arguments):
        noted.append(torch.get_num_threads())
        return image_batch(*arguments)

    monkeypatch.setattr(plan, "_FEW_VALUES", few)
    monkeypatch.setattr(plan, "image_batch", prepared)
    engine = compile_inference(model, given, dtype=torch.float32, try_runtimes=True)
    plain = compile_inference(model, dtype=torch.float32)
    noted.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine(given)
        plain(given)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert noted == [threads, 2]


def test_what_cannot_be_compiled(model, stand_in, monkeypatch):
    given = pictures((64, 80))
    with pytest.raises(ValueError, match=r"float32_share=0.5 is of an engine in eight bits: give dtype=torch.int8"):
        compile_inference(model, given, float32_share=0.5)
    for images in ([torch.rand(4, 64, 64)], [torch.rand(2, 64, 64)]):
        for dtype, others in ((None, False), (torch.int8, False), (torch.float32, True)):
            with pytest.raises(ValueError, match=r"images\[0\] must be \(3, H, W\)"):
                compile_inference(model, images, dtype, try_runtimes=others)
    with pytest.raises(UserError, match="images must be at least one: the runtimes are timed"):
        compile_inference(model, dtype=torch.int8)
    with pytest.raises(UserError, match=r"other runtimes compute in float32 or int8, got torch.bfloat16"):
        compile_inference(model, given, dtype=torch.bfloat16, try_runtimes=True)
    monkeypatch.setattr(engine_runtime, "fastest", lambda runs: ({}, {"Other": "it is not there"}))
    with pytest.raises(UserError, match="no runtime runs the graph: Other: it is not there"):
        compile_inference(model, given, dtype=torch.float32, try_runtimes=True)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a calibration with few images, and what random weights lose
def test_in_eight_bits_a_runtime_is_timed_with_the_last_convs_of_few_cells(model, monkeypatch):
    pytest.importorskip("onnxruntime")

    def everywhere(*_):
        raise AssertionError("the last convs were computed at all cells")

    def fastest(runs):
        with monkeypatch.context() as patch:
            patch.setattr(Sieve, "everywhere", everywhere)
            return onnx_network.fastest(runs)

    monkeypatch.setattr(engine_runtime, "fastest", fastest)
    engine = compile_inference(model, pictures((64, 80)), dtype=torch.int8)
    assert "ONNX Runtime was left out" not in str(engine)
    assert len(engine(pictures((80, 64)))[0]["boxes"]) > 5


def test_the_box_head_at_few_cells_detects_the_same(model, monkeypatch):
    pytest.importorskip("onnxruntime")
    engines = []
    for way in ("", BY_CELLS):

        def chosen(runs, name=f"ONNX Runtime{way}"):
            seconds, failed = onnx_network.fastest(runs)
            return {name: seconds[name]}, failed

        monkeypatch.setattr(engine_runtime, "fastest", chosen)
        engines.append(compile_inference(model, pictures((64, 80), (96, 64)), dtype=torch.int8))
        network = engines[-1].settings.network
        assert network
        assert network.sieve
        assert bool(network.sieve.tower) == bool(way)
        assert f"trunk and heads by ONNX Runtime{way}: at " in str(engines[-1])
    engines.append(pickle.loads(pickle.dumps(engines[1])))
    batch = pictures((64, 80), (90, 50), (64, 96))
    for right, *others in zip(*(engine(batch) for engine in engines), strict=True):
        assert len(right["boxes"]) > 5
        for ours in others:
            assert torch.equal(ours["labels"], right["labels"])
            torch.testing.assert_close(ours["boxes"], right["boxes"], rtol=0, atol=0.1)


@pytest.mark.slow
def test_the_embedded_detector_in_eight_bits(monkeypatch):
    pytest.importorskip("onnxruntime")
    noted = []

    def detected(*arguments):
        noted.append(torch.get_num_threads())
        return detect_candidates(*arguments)

    monkeypatch.setattr(plan, "detect_candidates", detected)
    model = load_model(TREES)[0].cpu()
    images = list(crops([decode_image(str(PHOTO), ImageReadMode.RGB)], 8, 96, 128))
    engine = compile_inference(model, images, dtype=torch.int8)
    report = engine.report
    assert report.runtime_choice
    assert report.difference
    assert report.runtime_choice.layers > 20
    assert f"{report.runtime_choice.layers} layers in eight bits, 0 left in float32, calibrated with 9 images" in str(
        engine
    )
    assert str(report.runtime_choice.kept) in str(engine)
    assert 1e-4 < report.difference.scores < 0.3
    other_size = decode_image(str(PHOTO), ImageReadMode.RGB)[:, :200, :150]
    batch = [images[0], other_size, images[3]]
    with torch.no_grad():
        kept = compare(zip(model(floats(batch)), engine(batch), strict=True))
    assert kept.found > 10
    assert kept.kept >= 0.95 * kept.found
    network = engine.settings.network
    assert network
    assert network.sieve
    others = network.sieve.measured(network.run(pixels_of(model, image)) for image in [other_size, *images[4:]])
    for field in ("margins", "excesses"):  # images that set no margin make no larger errors
        largest = [allowed / MARGIN for allowed in getattr(others, field)]
        assert all(map(lt, largest, getattr(network.sieve, field))), field
    if _openmp():
        before = torch.get_num_threads()
        noted.clear()
        torch.set_num_threads(2)
        try:
            engine(batch)
            monkeypatch.setattr(plan, "_FEW_LOGITS", 0)
            engine(batch)
        finally:
            torch.set_num_threads(before)
        assert noted == [1, 2]  # one thread makes detections of few logits
    with pytest.warns(UserWarning, match="the model finds nothing in the images for calibration"):
        compile_inference(model, pictures(*[(64, 64)] * 8), dtype=torch.int8)


def timm_network():
    pytest.importorskip("timm")
    return RetinaNet(timm_fpn("test_efficientnet", out_channels=16), 3)


NETWORKS = {
    "v1": lambda: retinanet_resnet18_fpn(num_classes=3, weights_backbone=None),
    "v2": lambda: retinanet_resnet18_fpn_v2(num_classes=3, weights_backbone=None),
    "SpineNet": lambda: retinanet_spinenet49s(num_classes=3),
    "timm": timm_network,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_in_eight_bits(name):
    """The heads' outputs at a size other than that of calibration. Random weights magnify roundings."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = NETWORKS[name]().eval().requires_grad_(False)
    spread(model.head)
    multiple = math.lcm(32, getattr(model.backbone, "size_divisible", 1))
    sample = torch.rand(1, 3, 128, 128)
    fold_batch_norm(model, partial(conv_outputs, model, sample))
    proto = trace(model, multiple)
    quantizer = Quantizer(proto, (torch.randn(1, 3, 128, 256).numpy() for _ in range(8)))
    convs = {node.input[1] for node in proto.graph.node if node.op_type == "Conv"}
    assert len(quantizer.layers) == len(convs) - 2
    pixels = torch.randn(2, 3, 256, 128)
    levels, expected = run_convs(model, pixels)
    features, returned = Network(quantizer.quantized().SerializeToString(), "ONNX Runtime")(model, pixels)
    assert [(len(level), *level.shape[2:]) for level in features] == [(2, *level.shape[2:]) for level in levels]
    assert returned.keys() == expected.keys()
    for key, outputs in expected.items():
        assert len(returned[key]) == len(outputs)
        for ours, theirs in zip(returned[key], outputs, strict=True):
            assert (ours - theirs).norm() < 0.5 * (theirs - theirs.mean()).norm(), key

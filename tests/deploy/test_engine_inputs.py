"""What users give an engine in another runtime: images and models of other dtypes, defaults of PyTorch's, hooks."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from retina_fast import RetinaNet, compile_inference
from retina_fast.data.errors import UserError
from tests.instruments.agreement import spread

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(3, 64, 64, generator=GENERATOR) for _ in range(3)]


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        return self.second(self.first(x).relu()).relu()


def network(channels=3):
    torch.manual_seed(0)
    generator = AnchorGenerator(((16,),), ((0.5, 1.0, 2.0),))
    mean, std = [0.5] * channels, [0.2] * channels
    backbone = Backbone(channels).float()
    model = RetinaNet(
        backbone, 2, min_size=None, image_mean=mean, image_std=std, anchor_generator=generator, score_thresh=0.3
    )
    spread(model.head)
    return model.float().eval()


@pytest.fixture(autouse=True)
def runtime(one_thread):
    pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def engine(model):
    return compile_inference(model, IMAGES, dtype=torch.int8)


@pytest.fixture(scope="module")
def found(engine):
    return engine(IMAGES)


def same(ours, theirs, tolerance=1e-4):
    assert sum(map(len, (image["scores"] for image in theirs))) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=tolerance)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=100 * tolerance)


def test_images_of_double_precision(found):
    same(compile_inference(network(), [image.double() for image in IMAGES], dtype=torch.int8)(IMAGES), found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision(dtype):
    given = [image.to(dtype) for image in IMAGES]
    ways: Any = {"dtype": torch.int8}, {"dtype": torch.float32, "try_runtimes": True}
    for way in ways:
        report: Any = compile_inference(network(), given, **way).report
        assert report.difference.images == 3
        assert not report.runtime_choice.failed.keys() - {"OpenVINO"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype, found):
    """Each engine is that of the model's weights in float32; bfloat16's are rounded."""
    expected = compile_inference(network().to(dtype).float(), IMAGES, dtype=torch.int8)(IMAGES)
    model = network().to(dtype)
    same(compile_inference(model, IMAGES, dtype=torch.int8)(IMAGES), expected)
    assert next(model.parameters()).dtype == dtype


@pytest.fixture(params=["dtype", "device"])
def other_default(request):
    """PyTorch with another default."""
    if request.param == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def test_other_defaults(engine, found, other_default):
    same(engine(IMAGES), found)


@pytest.mark.slow
def test_compiled_with_other_defaults(model, found, other_default, tmp_path):
    same(compile_inference(model, IMAGES, dtype=torch.int8)(IMAGES), found)
    retina_fast.export(model, tmp_path / "model.onnx", "onnx", (64, 64), quantize=IMAGES)


@pytest.mark.slow
def test_models_of_one_channel(tmp_path):
    grey = [image[:1] for image in IMAGES]
    model = network(channels=1)
    engine = compile_inference(model, grey, dtype=torch.int8)
    assert len(engine(grey)[0]["scores"]) > 1
    with pytest.raises(UserError, match="takes images of 3 channels, and the model 1"):
        retina_fast.export(model, tmp_path / "model.onnx", "onnx", (64, 64))


def test_sizes_that_no_graph_serves():
    model = network()
    model.transform.size_divisible = 1
    with pytest.raises(UserError, match="multiples of the model's size_divisible, 1: give it a multiple of 32"):
        compile_inference(model, IMAGES, dtype=torch.int8)


def test_forward_hooks_are_warned_of():
    model = network()
    model.backbone.first.register_forward_hook(lambda module, given, output: None)
    with pytest.warns(UserWarning, match=r"another runtime calls no forward hooks, .* of backbone.first$"):
        compile_inference(model, IMAGES, dtype=torch.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_inference(model, IMAGES, dtype=torch.float32)


def test_what_is_no_list_of_images():
    given: Any = (image for image in IMAGES)
    with pytest.raises(TypeError, match=r"images must be a list of \(C, H, W\) tensors .* got a <class 'generator'>"):
        compile_inference(network(), given, dtype=torch.int8)


class Images(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return IMAGES[i % len(IMAGES)]  # which never ends


@pytest.mark.slow
def test_a_dataset_and_sizes_of_numpy_calibrate_a_file(tmp_path):
    import numpy as np

    sides: Any = np.int64(64), np.int64(64)
    described = retina_fast.export(network(), tmp_path / "model.onnx", "onnx", sides, quantize=Images())
    assert described["quantized"]["calibrated_with"] == 3


def test_an_engine_that_cannot_move_goes_on(engine, found):
    for move in (lambda: engine.to("meta"), engine.half, engine.double):
        with pytest.raises(TypeError, match="stays in float32 on the CPU"):
            move()
        same(engine(IMAGES), found)
    same(engine.to("cpu")(IMAGES), found)

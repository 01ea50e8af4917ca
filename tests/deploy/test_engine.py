"""The engine against the model that it was made of; what it says and refuses."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torchvision.io import decode_image
from torchvision.models.detection import retinanet as tv

from retina_fast import RetinaNet, compile_inference, device, retinanet_resnet18_fpn_v2, retinanet_spinenet49s
from retina_fast.detections import Detections
from retina_fast.device import best_dtype
from retina_fast.predict.load import TREES, load_model
from tests.deploy.engine_soak import small_model
from tests.deploy.pictures import floats, images

PHOTOGRAPH = Path(__file__).parents[2] / "demo" / "heldout.jpg"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trees():
    return load_model(TREES)[0]


@pytest.fixture(scope="module")
def photograph():
    return decode_image(str(PHOTOGRAPH))[:, :300, :260]


# Against the model


def test_float32_finds_what_the_model_finds(trees, photograph, device):
    own = compile_inference(trees, dtype=torch.float32)
    batch = [photograph, photograph[:, 40:200, 20:]]
    for found, expected in zip(own(batch), trees([image.to(device) for image in floats(batch)]), strict=True):
        assert len(found["boxes"]) == len(expected["boxes"]) > 5
        best = slice(0, 100)  # of the many below, scores that differ in their last bits come in any order
        torch.testing.assert_close(found["boxes"][best], expected["boxes"][best], rtol=0, atol=0.01)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=2e-4)
        assert torch.equal(found["labels"], expected["labels"])


def test_uint8_and_float_images_and_a_batch_give_the_same(trees, photograph):
    own = compile_inference(trees, dtype=torch.float32)
    expected = own([photograph, photograph])
    for given in (floats([photograph] * 2), torch.stack([photograph] * 2), [photograph, photograph.double() / 255]):
        for found, image in zip(own(given), expected, strict=True):
            torch.testing.assert_close(found, image, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "scores", "boxes"), [(torch.float32, 2e-4, 0.01), (torch.bfloat16, 0.03, 2.0), (torch.float16, 5e-3, 0.3)]
)
def test_the_difference_on_a_photograph_is_small_and_said(dtype, scores, boxes, trees, photograph):
    own = compile_inference(trees, [photograph], dtype=dtype)
    seen = own.report.difference
    assert seen is not None
    assert 0 < seen.scores < scores
    assert 0 < seen.boxes_mean < seen.boxes < boxes
    text = str(own)
    assert "BatchNorm folded into convs: 15 of 15" in text
    assert f"scores differ by at most {seen.scores:.2g}" in text
    assert str(dtype).removeprefix("torch.") in text
    assert "not measured" in str(compile_inference(small_model()))


def test_the_model_is_left_as_it_was(photograph):
    model = retinanet_resnet18_fpn_v2(num_classes=2, min_size=64).train()
    before = copy.deepcopy(model.state_dict())
    own = compile_inference(model, [photograph[:, :64, :64]], dtype=torch.bfloat16)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert own.report.folded == own.report.norms == 20
    own([photograph[:, :64, :64]])
    with torch.autocast("cpu", dtype=torch.float16):  # the user's autocast does not reach in
        own([photograph[:, :64, :64]])


def test_torchvision_models_and_heads_of_the_users_own(device):
    model = small_model()
    theirs = tv.RetinaNet(model.backbone, 3, anchor_generator=model.anchor_generator, head=model.head).eval()
    theirs.transform = model.transform
    batch = images((50, 70))
    assert compile_inference(theirs, dtype=torch.float32)(batch)[0]["boxes"].shape[0] > 0

    class Head(tv.RetinaNetHead):
        def forward(self, x):
            return super().forward(x)

    head = Head(8, 1, 3).to(device)
    head.load_state_dict(model.head.state_dict())
    own = RetinaNet(model.backbone, 3, anchor_generator=model.anchor_generator, head=head, score_thresh=0.3)
    own.transform = model.transform
    found = compile_inference(own.eval(), dtype=torch.float32)(batch)
    torch.testing.assert_close(
        found[0]["boxes"], own(floats([image.to(device) for image in batch]))[0]["boxes"], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    "size_divisible", [pytest.param(128, marks=pytest.mark.slow), 32]
)  # the latter is less than the backbone needs
def test_spinenet(size_divisible):
    torch.manual_seed(0)
    model = retinanet_spinenet49s(num_classes=3, min_size=128, max_size=200, size_divisible=size_divisible)
    model.eval().score_thresh = 0.6
    for part in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        torch.nn.init.normal_(part.weight, std=50.0)  # an untrained tower gives next to nothing
        torch.nn.init.zeros_(part.bias)
    pictures = floats(images((128, 190), (100, 120)))
    own = compile_inference(model, pictures, dtype=torch.float32)
    assert own.report.folded == 130  # the heads' norms are a level's, their convs shared
    assert own.report.difference is not None
    assert own.report.difference.scores < 1e-4
    expected, found = (run([pictures[0]])[0] for run in (model, own))
    assert len(expected["boxes"]) == len(found["boxes"]) > 50
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


def test_evaluation_within_half_a_point_of_ap50(trees, photograph, device):
    """The float32 model's confident detections stand for the truth; python -m demo.engine has the people's own."""
    pytest.importorskip("faster_coco_eval")
    from retina_fast.data.coco import as_results
    from retina_fast.data.metrics import coco_metrics

    (found,) = trees(floats([photograph.to(device)]))
    confident = {key: value[found["scores"] > 0.3] for key, value in found.items()}
    boxes = as_results(confident, 1, [1])
    annotations = [
        {**box, "id": i, "iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3]} for i, box in enumerate(boxes, start=1)
    ]
    truth = {"images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1, "name": "Tree"}]}
    ap50 = [
        coco_metrics(truth, as_results(detections, 1, [1]), [1], 300).values["AP50"]
        for detections in (found, *(compile_inference(trees, dtype=d)([photograph])[0] for d in _DTYPES))
    ]
    assert ap50[0] > 0.95
    assert max(ap50) - min(ap50) < 0.005


_DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.3), parametrizations.spectral_norm],
    ids=["weight_norm", "pruned", "parametrised"],
)
def test_weights_that_are_computed(change):
    """Also those that the model has computed before, with their history."""
    model = small_model().train()
    for conv in [part for part in model.modules() if isinstance(part, nn.Conv2d)]:
        change(conv)
    batch = floats(images((40, 50)))
    model(batch, [{"boxes": torch.tensor([[2.0, 3, 30, 30]]), "labels": torch.tensor([0])}])
    model.eval()
    (found,) = compile_inference(model, dtype=torch.float32)(batch)
    (expected,) = model(batch)
    assert len(expected["scores"]) > 0
    torch.testing.assert_close(found["scores"], expected["scores"].detach(), rtol=0, atol=1e-4)


# What it says and refuses


def test_the_default_dtype(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda native=native: native)
        monkeypatch.setattr(device, "convs_gain_by_bfloat16", lambda: False)
        assert best_dtype(torch.device("cpu")) == dtype
    monkeypatch.setattr(device, "convs_gain_by_bfloat16", lambda: True)
    assert best_dtype(torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert best_dtype(torch.device("cuda")) == dtype


def test_parts_that_would_not_run_are_refused():
    with pytest.raises(TypeError, match="must be a torchvision RetinaNet"):
        compile_inference(nn.Identity())

    class Own(RetinaNet):
        def forward(self, images, targets=None):
            return []

    model = small_model()
    model.__class__ = Own
    with pytest.raises(TypeError, match="a forward of its own"):
        compile_inference(model)
    for name, change in {
        "forward": lambda model: model.register_forward_hook(lambda *_: None),
        "transform": lambda model: setattr(model, "transform", nn.Identity()),
        "anchor_generator": lambda model: setattr(model.anchor_generator, "grid_anchors", print),
        "box_coder": lambda model: setattr(model.box_coder, "weights", (10.0, 10, 5, 5)),
    }.items():
        model = small_model()
        change(model)
        with pytest.raises(TypeError, match=f"the model has a {name}"):
            compile_inference(model)


def test_bad_arguments_are_named():
    for dtype in (torch.int16, torch.float8_e5m2, "float16"):
        message = rf"dtype must be floating point of at least 16 bits, torch.float8_e4m3fn or int8, got '?{dtype}"
        with pytest.raises(ValueError, match=message):
            compile_inference(small_model(), dtype=dtype)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="on the meta device, where they have no values"):
        compile_inference(small_model().to("meta"))
    with pytest.raises(TypeError, match=r"images\[0\] must be a Tensor, got a <class 'str'>"):
        compile_inference(small_model(), images=["photograph.jpg"])  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="max_shapes must be at least 0, got -1"):
        compile_inference(small_model(), max_shapes=-1)
    own = compile_inference(small_model(), dtype=torch.float32)
    with pytest.raises(TypeError, match=r"images\[0\] is torch\.int32"):
        own([torch.zeros(3, 9, 9, dtype=torch.int32)])
    with pytest.raises(IndexError, match="images is empty"):
        own([])


def test_detections_are_padded_and_own_their_memory():
    own = compile_inference(small_model(), dtype=torch.float32)
    first = own.detect(images((30, 30), (30, 30)))
    assert isinstance(first, Detections)
    assert first.boxes.shape[:1] == (2,)
    kept = first.boxes.clone()
    own.detect(images((31, 31), (20, 20)))
    assert torch.equal(first.boxes, kept)

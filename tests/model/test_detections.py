"""The detection path as a whole: against torchvision's, as one graph, and on fake CUDA tensors."""

import math
from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from retina_fast import RetinaNet, retinanet_resnet18_fpn
from retina_fast.detections import Detections, Thresholds, detect
from retina_fast.forward import HeadOutputs
from retina_fast.kernels import candidate_places, candidate_search, nms_walk, postprocess
from tests.instruments import agreement, kernel_calls
from tests.instruments.fake_gpu import launches_of


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = retinanet_resnet18_fpn(num_classes=7, weights_backbone=None, min_size=64, max_size=128)
    agreement.spread(made.head.classification_head)
    return made.eval()


class Whole(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return tuple(self.model.detect(batch))


def close(ours, expected):
    """The same detections; rounding orders those whose scores are as good as equal."""
    ours = Detections(*ours)
    assert torch.equal(ours.counts, expected.counts)
    for found, image in zip(ours.to_list(), expected.to_list(), strict=True):
        torch.testing.assert_close(found["scores"], image["scores"])
        assert agreement.differing(found, image) == 0


@torch.no_grad()
def test_the_model_compiles_whole_for_any_batch(model, one_thread):
    compiled = torch.compile(model.detect, fullgraph=True, backend="aot_eager")
    for n in (3, 2, 5):
        batch = torch.rand(n, 3, 70, 90)
        torch._dynamo.mark_dynamic(batch, 0)  # an error if the first batch's size became a constant
        close(compiled(batch), model.detect(batch))
        assert model.detect(batch).counts.sum() > 0


@pytest.mark.slow
@torch.no_grad()
def test_the_model_exports_whole_for_any_batch(model, one_thread):
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"batch": {0: batch}}
    program = torch.export.export(Whole(model).eval(), (torch.rand(2, 3, 70, 90),), dynamic_shapes=shapes)
    for n in (1, 5):
        images = torch.rand(n, 3, 70, 90)
        close(program.module()(images), model.detect(images))


@torch.no_grad()
@pytest.mark.parametrize("size", [(70, 90), (64, 96), (33, 200)])
def test_a_batch_is_detected_as_its_images_are(model, size, one_thread):
    batch = torch.rand(3, 3, *size)
    for ours, alone in zip(model.detect(batch).to_list(), model(list(batch)), strict=True):
        for key in alone:
            torch.testing.assert_close(ours[key], alone[key], rtol=1e-5, atol=1e-4)


def head_outputs(batch, dtype, seed=0):
    outputs = [agreement.random_outputs(seed + b) for b in range(batch)]
    joined = {key: [torch.cat(levels) for levels in zip(*(o[key] for o in outputs), strict=True)] for key in outputs[0]}
    return {key: [level.to(dtype) for level in levels] for key, levels in joined.items()}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_detect_by_the_kernels_matches_torchvisions_exact_path(dtype, device, monkeypatch):
    """Every operation by its kernel, interpreted where there is no GPU; two images."""
    if device.type == "cpu":
        monkeypatch.setattr(nms_walk, "_FEWEST_GROUPS", 2)
        monkeypatch.setattr(nms_walk, "_MOST_GROUPS", 2)
        monkeypatch.setattr(candidate_search, "_SEARCH_TILE", 1 << 15)
        monkeypatch.setattr(candidate_search, "_SEARCH_PROGRAMS", 8)
        monkeypatch.setattr(candidate_places, "_TILES", ((math.inf, 256, 64, 1),))
    monkeypatch.setattr(postprocess, "runs_triton", lambda *tensors: True)
    theirs, _ = agreement.models()
    theirs.topk_candidates, theirs.detections_per_img = 60, 90
    outputs, split = head_outputs(2, dtype), agreement.anchors(theirs) * 2
    sizes = torch.tensor([agreement.IMAGE] * 2, device=device)
    logits, deltas = ([level.to(device) for level in outputs[key]] for key in ("cls_logits", "bbox_regression"))
    joined = torch.cat(split[0]).to(device)
    given = HeadOutputs({"cls_logits": logits, "bbox_regression": deltas}, joined, agreement.K, {})
    ours = detect(given, sizes, sizes, Thresholds(0.05, 60, 0.5, 90))
    outputs = {key: [level.float() for level in levels] for key, levels in outputs.items()}
    with patch.object(torchvision.ops.boxes, "batched_nms", torchvision.ops.boxes._batched_nms_vanilla):
        expected = theirs.postprocess_detections(outputs, split, [agreement.IMAGE] * 2)
    for found, image in zip(ours.to_list(), expected, strict=True):
        assert len(found["boxes"]) == len(image["boxes"]) > 0
        assert agreement.differing({key: value.cpu() for key, value in found.items()}, image) == 0


def test_scores_and_boxes_are_differentiable(model):
    (found,) = model([torch.rand(3, 64, 64)])
    grads = torch.autograd.grad(found["scores"].sum() + found["boxes"].sum(), list(model.head.parameters()))
    assert all(grad.abs().sum() > 0 for grad in grads)


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operations that launch something."""

    VIEWS = ("view", "expand", "detach", "permute", "select", "slice", "unsqueeze", "alias", "empty", "split", "t.")

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(name in str(func) for name in self.VIEWS):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_the_batch():
    made = {}
    for batch in (1, 8, 64):
        with Calls() as calls:
            launches = launches_of(lambda batch=batch: kernel_calls.detect(torch.bfloat16, batch))
        made[batch] = [launch.kernel.__name__ for launch in launches], calls.counts
    assert made[8] == made[64]
    assert [len(names) for names, _ in made.values()] == [7, 7, 7]


@torch.no_grad()
def test_the_whole_model_never_waits_for_the_gpu(monkeypatch):
    monkeypatch.setattr(RetinaNet, "_apply", lambda model, fn: model)  # the weights' layout: fake ones cannot be moved
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a driver

    def prepare():
        with torch.device("cuda"):
            model = retinanet_resnet18_fpn(num_classes=7, weights_backbone=None, min_size=64, max_size=128).eval()
            batch = torch.empty(3, 3, 70, 90)
        return model, batch

    launches = launches_of(lambda prepared: prepared[0].detect(prepared[1]), prepare)
    names = {launch.kernel.__name__ for launch in launches}
    assert {"_list_kernel", "_place_kernel", "_suppress_kernel", "_write_kept_kernel"} <= names


@pytest.mark.parametrize("name", ["score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"])
def test_thresholds_that_are_no_numbers_are_named(model, monkeypatch, name):
    monkeypatch.setattr(model, name, "0.5")
    with pytest.raises(TypeError, match=f"model.{name} must be a (whole )?number, got '0.5'"):
        Thresholds.of(model)


def test_functionalized_counts_are_read():
    found = Detections.from_list([{"boxes": torch.rand(2, 4), "scores": torch.rand(2), "labels": torch.arange(2)}], 3)
    shapes = torch.func.functionalize(lambda *fields: [len(f["boxes"]) for f in Detections(*fields).to_list()])
    assert shapes(*found) == [2]


def test_a_default_dtype_of_bfloat16_rounds_no_detection():
    found = {"boxes": torch.tensor([[1.0, 2, 257, 303]]), "scores": torch.tensor([0.123]), "labels": torch.tensor([3])}
    torch.set_default_dtype(torch.bfloat16)
    try:
        (again,) = Detections.from_list([found], width=2).to_list()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(again[field], found[field]) for field in found)

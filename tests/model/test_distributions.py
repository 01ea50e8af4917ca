"""Models whose boxes' sides are distributions: losses, detections, engine, export and torchvision's own code."""

import contextlib
import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet as tv

import retina_fast
from retina_fast import TrainingStep, checkpoint, compile_inference, from_torchvision, retinanet_resnet18_fpn_lite
from retina_fast.convert import to_torchvision
from retina_fast.deploy.export.onnx_file import OnnxPostprocess, translate
from retina_fast.deploy.export.postprocess import Postprocess
from retina_fast.detections import Thresholds, detect
from retina_fast.forward import HeadOutputs, run_network
from retina_fast.heads import DistributionRegressionHead, SeparableConv2d, give_distributions, level_norm_head
from retina_fast.kernels import distribution_loss as distribution_module
from retina_fast.losses import AtssMatcher, detection_losses
from retina_fast.targets import gather_targets
from tests.instruments.fake_gpu import launches_of
from tests.model.pairs import IMAGES, assert_same, good_targets, torchvision_model
from tests.model.test_loss_choices import scene
from tests.model.test_losses import GRIDS, K, case, kernels_everywhere, leaves, models, relative

N = 6


def distributed(cls=tv.RetinaNet):
    """A small model of torchvision's, with detections."""
    model = torchvision_model(cls=cls)
    give_distributions(model, N)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.3)
    return model


def outputs_of(counts, device="cpu"):
    """The scene of the losses' tests, with distributions in place of deltas."""
    outputs, targets, anchors = case(counts, device)
    generator = torch.Generator().manual_seed(3)
    outputs["bbox_regression"] = [
        torch.randn(len(counts), 9 * 4 * (N + 1), s, s, generator=generator).to(device).requires_grad_() for s in GRIDS
    ]
    return outputs, targets, anchors


def test_torchvisions_code_and_ours_agree():
    """Losses by its loop over the heads, detections by its postprocessing, which decodes by the model's coder."""
    plain = distributed()
    assert_same(from_torchvision(plain), plain)
    back = to_torchvision(from_torchvision(plain))
    assert type(back) is tv.RetinaNet
    assert from_torchvision(back).uses_fast_losses()
    assert from_torchvision(back).uses_fast_detections()
    assert_same(from_torchvision(copy.deepcopy(plain)), pickle.loads(pickle.dumps(back)))


def test_the_slow_path_decodes_them_too():
    model = from_torchvision(distributed()).eval()
    expected = model(IMAGES)

    def nms(*arguments):
        return retina_fast.ops.batched_nms(*arguments)

    with mock.patch.object(tv.box_ops, "batched_nms", nms):
        assert not model.uses_fast_detections()
        for ours, theirs in zip(model(IMAGES), expected, strict=True):
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-4)


def test_the_kernels_give_the_losses_and_gradients_of_the_references(device):
    outputs, targets, anchors = outputs_of((2, 0), device)
    _, model = models("giou", matcher="atss", classification_loss="quality_focal", box_weights="quality", reg_max=N)
    found = []
    for kernels in (True, False):
        with contextlib.ExitStack() as stack:
            if kernels:
                stack.enter_context(kernels_everywhere())
                stack.enter_context(mock.patch.object(distribution_module, "runs_triton", return_value=True))
            losses = model.compute_loss(targets, outputs, anchors)
        found.append((losses, torch.autograd.grad(torch.stack([*losses.values()]).sum(), leaves(outputs))))
    (ours, grads), (expected, exact) = found
    for key, value in ours.items():
        assert value > 0
        assert abs(value - expected[key]) <= 1e-5 * expected[key]
    assert all(relative(a, b) <= 1e-5 for a, b in zip(grads, exact, strict=True))


def test_nothing_of_the_loss_path_waits_for_the_gpu():
    outputs, targets, anchors = outputs_of((3, 0, 5))
    truths = gather_targets(targets, 3, torch.device("cpu"))

    def on_gpu(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    def run():
        fakes = {key: [on_gpu(level).requires_grad_() for level in levels] for key, levels in outputs.items()}
        boxes = truths._replace(
            boxes=on_gpu(truths.boxes), labels=on_gpu(truths.labels), offsets=on_gpu(truths.offsets)
        )
        made = HeadOutputs(fakes, on_gpu(anchors[0]), K, {}, reg_max=N)
        detection_losses(made, boxes, AtssMatcher(), "giou", 2.0, "quality_focal")

    names = [launch.kernel.__name__ for launch in launches_of(run)]
    assert names[-2:] == ["_distribution_loss_kernel", "_sum_kernel"]
    assert {"_box_quality_kernel", "_focal_loss_kernel"} < {*names}


def test_it_learns_and_a_model_file_keeps_it(tmp_path):
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"matcher": "atss", "classification_loss": "quality_focal", "reg_max": 16}
    model: Any = checkpoint.build("retinanet_resnet18_fpn_lite", 2, **kwargs)
    step = TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    first, *_, last = [{name: float(loss) for name, loss in step(*scene()).items()} for _ in range(4)]
    assert 0 < last["bbox_regression"] < 0.9 * first["bbox_regression"]
    about = checkpoint.Checkpoint("retinanet_resnet18_fpn_lite", kwargs, ["a", "b"], [1, 2], model.state_dict())
    checkpoint.save(about, tmp_path / "model.pt")
    again = checkpoint.load(tmp_path / "model.pt").build()
    assert (again.head.regression_head.reg_max, again.head.regression_head._loss_type) == (16, "giou")
    state = again.head.regression_head.bbox_reg.weight, model.head.regression_head.bbox_reg.weight
    torch.testing.assert_close(*state, rtol=1e-3, atol=1e-6)


def test_the_engine_gives_the_models_detections():
    model = from_torchvision(distributed()).eval()
    expected, found = model(IMAGES), compile_inference(model, dtype=torch.float32)(IMAGES)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["boxes"]) > 5
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)


class WithoutSuppression(Postprocess):
    """Without the loop, which eager PyTorch would compile."""

    def suppress(self, boxes, labels, valid, most):
        return valid


def test_the_exporters_postprocess_decodes_them():
    model = from_torchvision(distributed()).eval()
    model.nms_thresh = 1.0
    with torch.no_grad():
        outputs, sizes = run_network(model, IMAGES[0][None]), torch.tensor([[64, 80]])
        expected = detect(outputs, sizes, sizes, Thresholds.of(model))
        found = WithoutSuppression(model, outputs.anchors, 3, (64, 80), (64, 80)).eval()(**outputs.levels)
    assert expected.counts > 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_exported_graph_decodes_them_by_standard_operators():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = from_torchvision(distributed()).eval()
    with torch.no_grad():
        outputs, sizes = run_network(model, torch.stack([IMAGES[0], IMAGES[0].flip(2)])), torch.tensor([[64, 80]] * 2)
        expected = detect(outputs, sizes, sizes, Thresholds.of(model))
        graph = OnnxPostprocess(model, outputs.anchors, 3, (64, 80), (64, 80)).eval()
        shapes = {name: [{0: torch.export.Dim("batch")}] for name in outputs.levels}
        proto = translate(torch.export.export(graph, tuple(outputs.levels.values()), dynamic_shapes=shapes), shapes)
    assert {node.domain for node in proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    levels = [level.numpy() for (level,) in outputs.levels.values()]
    found = session.run(None, dict(zip([node.name for node in session.get_inputs()], levels, strict=True)))
    assert expected.counts.min() > 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("separable", [False, True])
def test_heads_with_norms_of_each_level(separable):
    head: Any = level_norm_head(16, num_anchors=3, num_classes=2, width=8, depth=1, num_levels=2, separable=separable)
    head.regression_head = DistributionRegressionHead(head.regression_head, N)
    features = [torch.rand(2, 16, 4, 4), torch.rand(2, 16, 2, 2)]
    assert head(features)["bbox_regression"].shape == (2, 60, 4 * (N + 1))
    assert isinstance(head.regression_head.bbox_reg, SeparableConv2d) == separable
    assert head.regression_head.bbox_reg.weight.std() < 2e-5


def test_joined_outputs_are_as_the_head_alone_gives_them():
    model = from_torchvision(distributed())
    pixels = torch.rand(1, 3, 64, 80)
    joined = run_network(model, pixels).joined()["bbox_regression"]
    assert torch.equal(joined, model.head([model.backbone(pixels)])["bbox_regression"])
    assert joined.shape == (1, 720, 4 * (N + 1))


class OwnRegression(nn.Module):
    def forward(self, x):
        raise AssertionError


def test_what_is_refused():
    with pytest.raises(ValueError, match="give weights or reg_max, not both"):
        retina_fast.retinanet_resnet50_fpn(weights="DEFAULT", reg_max=16)
    for options, message in (
        ({"reg_max": 0}, "reg_max must be a whole number of at least 1, got 0"),
        ({"reg_max": 16.0}, "reg_max must be a whole number of at least 1, got 16.0"),
        ({"reg_max": 16, "box_loss": "l1"}, "box_loss must be one of giou, diou, ciou with reg_max, got 'l1'"),
    ):
        with pytest.raises(ValueError, match=message):
            retinanet_resnet18_fpn_lite(num_classes=2, **options)
    model = from_torchvision(distributed()).train()
    model.head.regression_head._loss_type = "l1"
    with pytest.raises(ValueError, match="loss_type must be one of giou, diou, ciou, got 'l1'"):
        model(IMAGES, good_targets())
    model.head.regression_head = OwnRegression()
    with pytest.raises(TypeError, match=r"reg_max needs torchvision's regression head, the model has .*OwnRegression"):
        give_distributions(model, 16)

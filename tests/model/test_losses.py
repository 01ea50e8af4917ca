"""The loss path strung together by the kernels: torchvision's losses, few launches, nothing that waits for the GPU."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import retinanet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import sigmoid_focal_loss

from retina_fast import RetinaNet
from retina_fast.forward import HeadOutputs
from retina_fast.kernels import (
    anchor_matching,
    atss_matching,
    box_loss,
    box_quality,
    focal_loss,
    one_pass,
    soft_focal_loss,
    task_aligned_matching,
)
from retina_fast.losses import detection_losses
from retina_fast.targets import GroundTruths, gather_targets
from tests.instruments.fake_gpu import Launch, launches_of, recording_launches

K = 5
GRIDS = (8, 4, 2, 1, 1)
SIZE = 64
LOSSES = ("l1", "giou")


@contextlib.contextmanager
def kernels_everywhere():
    """The operations by their kernels, on CPU tensors too."""
    with (
        mock.patch("retina_fast.losses.anchor_matching", _matching),
        mock.patch("retina_fast.losses.focal_loss", _focal_loss),
        mock.patch("retina_fast.losses.box_loss", _box_loss),
        mock.patch("retina_fast.losses.atss_matching", _atss_matching),
        mock.patch.object(box_quality, "runs_triton", return_value=True),
        mock.patch.object(soft_focal_loss, "runs_triton", return_value=True),
        mock.patch.object(task_aligned_matching, "runs_triton", return_value=True),
    ):
        yield


def _matching(*arguments):
    return anchor_matching.Matches(*anchor_matching._anchor_matching_triton(*arguments))


def _atss_matching(*arguments):
    return anchor_matching.Matches(*atss_matching._atss_matching_triton(*arguments))


def _focal_loss(levels, labels, normalizers, num_classes, gamma):
    flat = focal_loss.flatten_all(levels, num_classes)
    return focal_loss._focal_loss_triton(flat, labels, normalizers, num_classes, 0.25, gamma)


def _box_loss(levels, *arguments):
    return box_loss._box_loss_triton(box_loss.flatten_all(levels, 4), *arguments)


def models(loss_type, **options):
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # pyrefly: ignore[bad-argument-type]
    both = TorchvisionRetinaNet(backbone, K), RetinaNet(backbone, K, **options)
    for model in both:
        model.head.regression_head._loss_type = loss_type
    return both


def case(counts, device="cpu", dtype=torch.float32):
    """Head outputs level by level, targets, anchors shared by the images."""
    generator = torch.Generator().manual_seed(len(counts))
    outputs = {
        key: [
            (torch.randn(len(counts), 9 * channels, s, s, generator=generator) * spread - shift)
            .to(device, dtype)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
            for s in GRIDS
        ]
        for key, channels, spread, shift in (("cls_logits", K, 1.0, 3.0), ("bbox_regression", 4, 0.3, 0.0))
    }
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * SIZE * 0.7
        boxes = torch.cat((corner, corner + 6 + torch.rand(count, 2, generator=generator) * SIZE * 0.4), dim=1)
        labels = torch.randint(0, K, (count,), generator=generator)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    features = [torch.zeros(len(counts), 8, s, s, device=device) for s in GRIDS]
    images = ImageList(torch.zeros(len(counts), 3, SIZE, SIZE, device=device), [(SIZE, SIZE)] * len(counts))
    (anchors, *_) = models("l1")[0].anchor_generator.to(device)(images, features)
    return outputs, targets, [anchors] * len(counts)


def leaves(outputs):
    return [level for levels in outputs.values() for level in levels]


def flat(levels, channels):
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, channels) for x in levels], dim=1)


def relative(value, expected):
    return (value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_focusing_exponent_is_the_models(device, kernels, monkeypatch):
    outputs, targets, anchors = case((3, 1), device)
    theirs, ours = models("l1")
    ours.focal_gamma = 1.5
    joined = {"cls_logits": flat(outputs["cls_logits"], K), "bbox_regression": flat(outputs["bbox_regression"], 4)}
    with monkeypatch.context() as patch:  # ours would step aside for a function that somebody has replaced
        patch.setattr(retinanet, "sigmoid_focal_loss", functools.partial(sigmoid_focal_loss, gamma=1.5))
        expected = theirs.compute_loss(targets, joined, anchors)
    with kernels_everywhere() if kernels else contextlib.nullcontext():
        losses = ours.compute_loss(targets, outputs, anchors)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("counts", [(3, 0, 1), (0,), (0, 0), (25, 2)])
def test_the_kernels_give_torchvision_losses_and_gradients(device, counts, loss_type):
    outputs, targets, anchors = case(counts, device)
    theirs, ours = models(loss_type)
    joined = {"cls_logits": flat(outputs["cls_logits"], K), "bbox_regression": flat(outputs["bbox_regression"], 4)}
    expected = theirs.compute_loss(targets, joined, anchors)
    with kernels_everywhere():
        losses = ours.compute_loss(targets, outputs, anchors)
    for key, value in losses.items():
        assert abs(value - expected[key]) <= 1e-5 * expected[key]
    total, theirs_total = (torch.stack([*found.values()]).sum() for found in (losses, expected))
    grads = torch.autograd.grad(total, leaves(outputs))
    exact = torch.autograd.grad(theirs_total, leaves(outputs), allow_unused=True, materialize_grads=True)
    assert all(relative(a, b) <= 1e-5 for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_in_bfloat16_the_matches_are_those_of_float32_and_the_losses_close(device, loss_type):
    counts = (4, 0, 9)
    wide, targets, anchors = case(counts, device)
    narrow = {key: [level.detach().bfloat16() for level in levels] for key, levels in wide.items()}
    seen = []

    def spy(*arguments):
        seen.append(_matching(*arguments))
        return seen[-1]

    _, model = models(loss_type)
    with kernels_everywhere(), mock.patch("retina_fast.losses.anchor_matching", spy):
        expected, losses = (model.compute_loss(targets, outputs, anchors) for outputs in (wide, narrow))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    for key, value in losses.items():
        assert value.dtype == torch.float32
        assert abs(value - expected[key]) <= 1e-2 * expected[key]


class Ops(TorchDispatchMode):
    """The names of the ops that launch something: those that neither make a view nor only allocate."""

    _FREE = ("empty", "new_empty", "view", "detach", "alias", "permute", "expand", "select", "slice", "split")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if not name.lstrip("_").startswith(self._FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def bodies_in_sight():
    """The launchers as plain functions, so that the ops within them count; on CPU tensors, where the kernels do not
    run: the host does as on a GPU."""
    launches: list[Launch] = []
    with (
        kernels_everywhere(),
        recording_launches(launches),
        mock.patch.object(focal_loss, "_focal_loss_op", focal_loss._focal_loss_op._init_fn),
        mock.patch.object(box_loss, "_box_loss_op", box_loss._box_loss_op._init_fn),
        mock.patch.object(one_pass, "scale_op", one_pass.scale_op._init_fn),
        Ops() as ops,
    ):
        yield launches, ops.names


def test_a_default_dtype_of_bfloat16_rounds_no_normalizer():
    """An integer tensor times a Python number has the default dtype, in which 303 would be 304."""
    outputs, targets, anchors = case((1, 1, 1))
    seen = []

    def matching(*arguments):
        found = anchor_matching.anchor_matching(*arguments)
        return found._replace(num_foreground=torch.tensor([101, 0, 3], dtype=torch.int32))

    def loss(levels, labels, normalizers, num_classes, gamma):
        seen.append(normalizers)
        return focal_loss.focal_loss(levels, labels, normalizers, num_classes, gamma=gamma)

    torch.set_default_dtype(torch.bfloat16)
    try:
        with (
            mock.patch("retina_fast.losses.anchor_matching", matching),
            mock.patch("retina_fast.losses.focal_loss", loss),
        ):
            models("l1")[1].compute_loss(targets, outputs, anchors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [303, 3, 9]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_launches_of_the_loss_path_do_not_grow_with_the_batch(batch):
    outputs, targets, anchors = case((3,) * batch)
    truths = gather_targets(targets, batch, torch.device("cpu"))
    matcher, incoming = Matcher(0.5, 0.4, True), torch.ones(())
    with bodies_in_sight() as (launches, ops):
        losses = detection_losses(HeadOutputs(outputs, anchors[0], K, {}), truths, matcher, "giou")
        total = losses["classification"] + losses["bbox_regression"]
        torch.autograd.grad(total, leaves(outputs), incoming)
    assert [launch.kernel.__name__ for launch in launches] == [
        "_anchor_matching_kernel", "_match_kernel", "_focal_loss_kernel", "_sum_kernel", "_box_loss_kernel",
        "_sum_kernel", "_scale_kernel", "_scale_kernel",
    ]  # fmt: skip
    ops.remove("lift_fresh")  # a number on the host, which launches nothing
    assert ops == ["new_zeros", "clamp", "mul.Tensor", "add.Tensor"]
    assert len(launches) + len(ops) <= 16


def test_nothing_of_the_loss_path_waits_for_the_gpu():
    outputs, targets, anchors = case((3, 0, 5))
    truths = gather_targets(targets, 3, torch.device("cpu"))

    def on_gpu(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    def run():
        fakes = {key: [on_gpu(level).requires_grad_() for level in levels] for key, levels in outputs.items()}
        boxes = GroundTruths(on_gpu(truths.boxes), on_gpu(truths.labels), on_gpu(truths.offsets), truths.counts)
        matcher = Matcher(0.5, 0.4, True)
        detection_losses(HeadOutputs(fakes, on_gpu(anchors[0]), K, {}), boxes, matcher, "l1")

    assert len(launches_of(run)) == 6

"""The matchers and losses that torchvision does not have, as arguments of the model."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import Matcher

from retina_fast import (
    AtssMatcher,
    RetinaNet,
    TaskAlignedMatcher,
    TrainingStep,
    checkpoint,
    from_torchvision,
    retinanet_resnet18_fpn_lite,
)
from retina_fast.convert import to_torchvision
from retina_fast.forward import HeadOutputs
from retina_fast.kernels.atss_matching import atss_matching
from retina_fast.kernels.box_loss import box_loss
from retina_fast.kernels.box_quality import box_quality
from retina_fast.kernels.soft_focal_loss import soft_focal_loss
from retina_fast.kernels.task_aligned_matching import task_aligned_matching
from retina_fast.losses import detection_losses
from retina_fast.targets import gather_targets
from tests.instruments.fake_gpu import launches_of
from tests.model.test_losses import GRIDS, K, case, flat, kernels_everywhere, leaves, models, relative

SIZES = [9 * s * s for s in GRIDS]
OPTIONS = [
    {"matcher": "atss"},
    {"classification_loss": "quality_focal", "box_loss": "giou"},
    {"matcher": "atss", "classification_loss": "varifocal", "box_loss": "ciou"},
    {"matcher": "task_aligned", "classification_loss": "quality_focal", "box_loss": "giou", "box_weights": "quality"},
]


def tiny(**options):
    torch.manual_seed(0)
    return retinanet_resnet18_fpn_lite(num_classes=2, **options).train()


def scene(seed=0):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return [image, image.flip(1)], [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0], [30.0, 34.0, 60.0, 62.0]]), "labels": torch.tensor([1, 0])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


def test_the_losses_are_those_of_the_operations(device):
    outputs, targets, anchors = case((3, 0, 2), device)
    _, model = models("l1", matcher=AtssMatcher(3), classification_loss="varifocal", box_loss="giou")
    losses = model.compute_loss(targets, outputs, anchors)
    truths = gather_targets(targets, 3, anchors[0].device)
    matches = atss_matching(anchors[0], truths.boxes, truths.labels, truths.offsets, SIZES, 27)
    assert matches.num_foreground.tolist()[1] == 0
    assert (matches.num_foreground[::2] > 0).all()
    normalizers = matches.num_foreground.clamp(min=1) * 3.0
    geometry = anchors[0], matches.indices, truths.boxes, truths.offsets
    quality = box_quality(outputs["bbox_regression"], *geometry)
    expected = soft_focal_loss(outputs["cls_logits"], matches.labels, quality, normalizers, K, "varifocal")
    assert torch.equal(losses["classification"], expected)
    expected = box_loss(outputs["bbox_regression"], *geometry, normalizers, "l1")
    assert torch.equal(losses["bbox_regression"], expected)  # `models` has set l1 on the live model


@pytest.mark.parametrize("joined", [False, True])
def test_task_aligned_targets_are_those_of_scores_and_weights(device, joined):
    """Their quality is the matcher's; outputs joined as torchvision joins them do as well."""
    outputs, targets, anchors = case((3, 0, 1), device)
    _, model = models("giou", matcher="task_aligned", classification_loss="quality_focal", box_weights="quality")
    model.proposal_matcher = TaskAlignedMatcher(5, 0.5, 2.0)
    (logits, deltas), truths = outputs.values(), gather_targets(targets, 3, anchors[0].device)
    given = {name: flat(levels, c) for (name, levels), c in zip(outputs.items(), (K, 4), strict=True)}
    losses = model.compute_loss(targets, given if joined else outputs, anchors)
    found = truths.boxes, truths.labels, truths.offsets
    matches = task_aligned_matching(logits, deltas, anchors[0], *found, K, 5, 0.5, 2.0)
    assert (matches.num_foreground > 0).tolist() == [True, False, True]
    normalizers = matches.num_foreground.clamp(min=1) * 3.0
    expected = soft_focal_loss(logits, matches.labels, matches.targets, normalizers, K, "quality_focal")
    torch.testing.assert_close(losses["classification"], expected, rtol=1e-6, atol=0)
    normalizers = matches.targets.sum(dim=1).clamp(min=1) * 3
    geometry = anchors[0], matches.indices, truths.boxes, truths.offsets
    expected = box_loss(deltas, *geometry, normalizers, "giou", matches.targets)
    torch.testing.assert_close(losses["bbox_regression"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_the_kernels_give_the_losses_and_gradients_of_the_references(device, options):
    outputs, targets, anchors = case((1, 0), device)
    _, model = models("giou", **options)
    found = []
    for context in (kernels_everywhere(), contextlib.nullcontext()):
        with context:
            losses = model.compute_loss(targets, outputs, anchors)
        found.append((losses, torch.autograd.grad(torch.stack([*losses.values()]).sum(), leaves(outputs))))
    (ours, grads), (expected, exact) = found
    for key, value in ours.items():
        assert abs(value - expected[key]) <= 1e-5 * expected[key]
    assert all(relative(a, b) <= 1e-5 for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize(
    "options", [*[pytest.param(x, marks=pytest.mark.slow) for x in OPTIONS[:3]], OPTIONS[3]], ids=str
)
def test_it_learns(options):
    model = tiny(**options)
    step = TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    first, *_, last = [{name: float(loss) for name, loss in step(*scene()).items()} for _ in range(6)]
    assert 0 < last["bbox_regression"] < 0.8 * first["bbox_regression"]
    assert last["classification"] > 0
    if "classification_loss" not in options:  # the targets of the others grow as boxes fit better
        assert last["classification"] < 0.8 * first["classification"]
    model.eval()
    assert sorted(model(scene()[0])[0]) == ["boxes", "labels", "scores"]


ATSS_LAUNCHES = [
    "_surround_kernel", "_nearest_kernel", "_choose_kernel", "_write_matches_kernel", "_box_quality_kernel",
]  # fmt: skip
ALIGNED_LAUNCHES = ["_predict_kernel", "_align_kernel", "_offer_kernel", "_write_matches_kernel", "_target_kernel"]


@pytest.mark.parametrize(
    ("matcher", "launches"), [(AtssMatcher(), ATSS_LAUNCHES), (TaskAlignedMatcher(), ALIGNED_LAUNCHES)]
)
def test_nothing_of_the_loss_path_waits_for_the_gpu(matcher, launches):
    outputs, targets, anchors = case((3, 0, 5))
    truths = gather_targets(targets, 3, torch.device("cpu"))

    def on_gpu(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    def run():
        fakes = {key: [on_gpu(level).requires_grad_() for level in levels] for key, levels in outputs.items()}
        boxes = truths._replace(
            boxes=on_gpu(truths.boxes), labels=on_gpu(truths.labels), offsets=on_gpu(truths.offsets)
        )
        made = HeadOutputs(fakes, on_gpu(anchors[0]), K, {})
        detection_losses(made, boxes, matcher, "giou", 2.0, "varifocal")

    assert [launch.kernel.__name__ for launch in launches_of(run)] == [
        *launches, "_focal_loss_kernel", "_sum_kernel", "_box_loss_kernel", "_sum_kernel",
    ]  # fmt: skip


def test_box_losses_weighed_by_quality(device):
    """Each foreground anchor's loss times its IoU, over the sum of these in its image, at least 1."""
    outputs, targets, anchors = case((3, 0, 1), device)
    _, model = models("giou", matcher="atss", box_weights="quality")
    deltas, truths = outputs["bbox_regression"], gather_targets(targets, 3, anchors[0].device)
    matches = atss_matching(anchors[0], truths.boxes, truths.labels, truths.offsets, SIZES, 81)
    geometry = anchors[0], matches.indices, truths.boxes, truths.offsets
    quality = box_quality(deltas, *geometry)
    totals = quality.sum(dim=1)
    assert totals.max() > 1 > totals.min()
    expected = box_loss(deltas, *geometry, totals.clamp(min=1) * 3, "giou", quality)
    grads = torch.autograd.grad(expected, deltas)
    for context in (kernels_everywhere(), contextlib.nullcontext()):
        with context:
            ours = model.compute_loss(targets, outputs, anchors)["bbox_regression"]
        assert abs(ours - expected) <= 1e-5 * expected
        found = torch.autograd.grad(ours, deltas)
        assert all(relative(x, y) <= 1e-5 for x, y in zip(found, grads, strict=True))


def test_live_changes_and_torchvisions_model(device):
    outputs, targets, anchors = case((2, 1), device)
    plain, model = models("l1")
    for change in (lambda m: m, from_torchvision):
        fast = change(copy.deepcopy(plain if change is from_torchvision else model))
        before = fast.compute_loss(targets, outputs, anchors)
        fast.proposal_matcher, fast.classification_loss = AtssMatcher(), "quality_focal"
        assert fast.uses_fast_losses()
        after = fast.compute_loss(targets, outputs, anchors)
        assert all(before[name] != after[name] for name in before)


def test_a_model_file_keeps_the_choices(tmp_path):
    kwargs: dict[str, Any] = {"matcher": "atss", "classification_loss": "varifocal", "box_loss": "giou"}
    kwargs["box_weights"] = "quality"
    model = checkpoint.build("retinanet_resnet18_fpn_lite", 1, **kwargs)
    about = checkpoint.Checkpoint("retinanet_resnet18_fpn_lite", kwargs, ["Tree"], [1], model.state_dict())
    checkpoint.save(about, tmp_path / "model.pt")
    again = checkpoint.load(tmp_path / "model.pt").build()
    assert again.proposal_matcher == AtssMatcher(9)
    assert again.box_weights == "quality"
    assert (again.classification_loss, again.head.regression_head._loss_type) == ("varifocal", "giou")


def test_joined_outputs_have_no_levels():
    outputs, targets, anchors = case((1,))
    _, model = models("l1", matcher="atss")
    joined = {"cls_logits": flat(outputs["cls_logits"], K), "bbox_regression": flat(outputs["bbox_regression"], 4)}
    with pytest.raises(ValueError, match=r"level by level, \(B, A\*C, H, W\), got \[\(1, 774, 5\)\]"):
        model.compute_loss(targets, joined, anchors)


def test_what_the_model_refuses():
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # pyrefly: ignore[bad-argument-type]
    wrong: Any = (
        ({"matcher": "ATSS"}, "matcher must be one of atss, task_aligned, or a matcher itself, got 'ATSS'"),
        ({"matcher": "atss", "proposal_matcher": Matcher(0.5, 0.4)}, "give one of them"),
        (
            {"classification_loss": "qfl"},
            "classification_loss must be one of focal, quality_focal, varifocal, got 'qfl'",
        ),
        ({"box_weights": "iou"}, "box_weights must be one of quality, got 'iou'"),
        ({"box_loss": "l2"}, "box_loss must be one of l1, smooth_l1, giou, diou, ciou, got 'l2'"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            RetinaNet(backbone, K, **options)
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1, got 0"):
        AtssMatcher(0)
    with pytest.raises(ValueError, match="top_k must be a whole number from 1 to 128, got 129"):
        TaskAlignedMatcher(129)
    with pytest.raises(ValueError, match=r"beta must be a number of at least 0, got -6\.0"):
        TaskAlignedMatcher(beta=-6.0)


def test_what_is_set_later_is_checked_at_the_next_step():
    model = tiny()
    model.classification_loss = "vfl"
    with pytest.raises(ValueError, match=r"classification_loss must be one of focal, .*, got 'vfl'"):
        model(*scene())
    model.classification_loss, model.proposal_matcher = "focal", "atss"
    with pytest.raises(TypeError, match=r"proposal_matcher must be a matcher, such as AtssMatcher\(\), got 'atss'"):
        model(*scene())


def test_what_only_an_argument_would_set_is_refused():
    model = tiny()
    with pytest.raises(AttributeError, match=r"model\.matcher would change nothing: set model\.proposal_matcher"):
        model.matcher = "atss"
    with pytest.raises(AttributeError, match=r"set model\.head\.regression_head\._loss_type, to one of l1, .*ciou"):
        model.box_loss = "giou"

    class Own(tv.RetinaNet):
        pass

    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # pyrefly: ignore[bad-argument-type]
    own: Any = from_torchvision(Own(backbone, K))
    own.matcher = "the user's own"
    assert own.matcher == "the user's own"


@pytest.mark.parametrize("change", [{"classification_loss": "varifocal"}, {"focal_gamma": 1.5}])
def test_torchvisions_copy_warns_that_it_is_trained_by_another_loss(change, recwarn):
    model = tiny()
    to_torchvision(model)
    assert not recwarn.list
    (name, value), *_ = change.items()
    setattr(model, name, value)
    with pytest.warns(UserWarning, match=f"torchvision's model has no .*{name} '?{value}.*its focal loss"):
        to_torchvision(model)


class OwnHeadLoss(tv.RetinaNetRegressionHead):
    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return 3 * super().compute_loss(targets, head_outputs, anchors, matched_idxs)


def test_a_part_of_ones_own_cannot_be_combined_with_them():
    model = tiny(matcher="atss")
    with pytest.raises(NotImplementedError, match="ATSS needs the anchors' centres"):
        to_torchvision(model).train()(*scene())
    with pytest.raises(NotImplementedError, match="task-aligned assignment needs scores and predicted boxes, which"):
        to_torchvision(tiny(matcher="task_aligned")).train()(*scene())
    model.head.regression_head.__class__ = OwnHeadLoss
    with pytest.raises(NotImplementedError, match="ATSS needs the anchors' centres"):
        model(*scene())
    model.proposal_matcher, model.classification_loss = Matcher(0.5, 0.4), "varifocal"
    with pytest.raises(NotImplementedError, match="'varifocal' with box_weights None needs"):
        model(*scene())

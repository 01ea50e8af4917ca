"""Task-aligned assignment, by the reference and by the kernels, against the paper's definition in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.ops import box_iou

from retina_fast.kernels import aligned_candidates, match_keys
from retina_fast.kernels import task_aligned_matching as module
from retina_fast.kernels.task_aligned_matching import (
    AlignedMatches,
    task_aligned_matching,
    task_aligned_matching_reference,
)
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS
from tests.kernels.aligned_scenes import Scene, paper, scene
from tests.ptx.cases import OTHER_ORDERS, check, names

PATHS = pytest.mark.parametrize("path", ["reference", "kernel"])


def match(path, scene, top_k=5, alpha=1.0, beta=6.0):
    device = torch.device("cuda" if path == "kernel" and torch.cuda.is_available() else "cpu")
    function: Any = module._task_aligned_matching_triton if path == "kernel" else task_aligned_matching_reference
    boxes = torch.cat([torch.zeros(0, 4), *scene.images])
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *scene.labels])
    offsets = torch.tensor([0] + [len(boxes) for boxes in scene.images]).cumsum(0)
    levels = [[level.to(device) for level in levels] for levels in (scene.logits, scene.deltas)]
    tensors = [x.to(device) for x in (scene.anchors, boxes, labels, offsets)]
    given = *levels, *tensors, scene.num_classes, top_k, alpha, beta, scene.reg_max
    matches = AlignedMatches(*[x.cpu() for x in function(*given)])
    assert torch.equal(matches.num_foreground, (matches.indices >= 0).sum(dim=1))
    for b, of_image in enumerate(scene.labels):
        index = matches.indices[b].long()
        expected = torch.where(index >= 0, of_image[index.clamp(min=0)], -1) if len(of_image) else index
        assert torch.equal(matches.labels[b].long(), expected)
    return matches


def assert_equals_paper(path, scene, top_k=5, alpha=1.0, beta=6.0):
    ours = match(path, scene, top_k, alpha, beta)
    for b in range(len(scene.images)):
        index, targets, gap = paper(scene, b, top_k, alpha, beta)
        assert gap > 1e-4, "two anchors are as good as each other, so that rounding decides"
        assert torch.equal(ours.indices[b].long(), index)
        torch.testing.assert_close(ours.targets[b].double(), targets, rtol=1e-4, atol=1e-7)
    return ours


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, chunks and shares of them, and programs that serve several ground truths, where all are few."""
    monkeypatch.setattr(aligned_candidates, "_TILE", 16)
    monkeypatch.setattr(aligned_candidates, "_TILES", 2)
    monkeypatch.setattr(aligned_candidates, "_SHARES", 2)
    monkeypatch.setattr(aligned_candidates, "_DISTRIBUTIONS", 8)
    monkeypatch.setattr(aligned_candidates, "_PROGRAMS", 12)
    monkeypatch.setattr(module, "_PROGRAMS", 6)
    monkeypatch.setattr(match_keys, "_TILE", 64)
    monkeypatch.setattr(module, "_PAIRS", 200)


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel leaves unwritten is the largest integer, or NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@PATHS
@pytest.mark.parametrize(
    ("made", "top_k", "alpha", "beta"),
    [
        (scene(), 5, 1.0, 6.0),
        (scene((2, 0), num_classes=1, seed=1), 100, 0.5, 4.0),
        (scene((2,), reg_max=4, seed=2), 3, 1.0, 6.0),
        (scene((3,), seed=3, dtype=torch.bfloat16), 1, 1.0, 0.0),
    ],
    ids=["deltas", "one class, all inside", "distributions", "the best, by its score alone"],
)
def test_matches_the_paper(path, made, top_k, alpha, beta):
    ours = assert_equals_paper(path, made, top_k, alpha, beta)
    assert (ours.num_foreground > 0).tolist() == [len(boxes) > 0 for boxes in made.images]


@PATHS
def test_an_anchor_of_several_goes_to_the_greatest_iou(path):
    made = scene((2,), seed=4)
    near = torch.tensor([[2.0, 2.0, 30.0, 32.0], [3.0, 1.0, 33.0, 33.0]])
    made = made._replace(images=[near], labels=[torch.tensor([1, 2])])
    alone = [match(path, made._replace(images=[near[i, None]], labels=[made.labels[0][i, None]])) for i in (0, 1)]
    assert ((alone[0].indices >= 0) & (alone[1].indices >= 0)).any()
    assert_equals_paper(path, made)


@PATHS
def test_equal_ground_truths_the_first_wins(path):
    made = scene((1,), seed=5)
    alone = match(path, made)
    same = made._replace(images=[made.images[0].repeat(3, 1)], labels=[made.labels[0].repeat(3)])
    for ours, expected in zip(match(path, same), alone, strict=True):
        assert torch.equal(ours, expected)


@PATHS
def test_of_equal_alignments_the_lower_index_is_better(path):
    """All anchors are one, and predict the same."""
    anchors = torch.tensor([[4.0, 4.0, 20.0, 20.0]]).repeat(40, 1)
    made = Scene([torch.zeros(1, 40, 2)], [torch.zeros(1, 40, 4)], anchors, [anchors[:1] + 1], [torch.tensor([1])], 2)
    matches = match(path, made, 3)
    assert (matches.indices[0, :3] == 0).all()
    assert (matches.indices[0, 3:] == -1).all()
    iou = box_iou(anchors[:1], anchors[:1] + 1)[0, 0]
    torch.testing.assert_close(matches.targets[0, :3], iou.expand(3), rtol=1e-6, atol=0)


@PATHS
def test_alignments_that_underflow_are_still_compared(path):
    made = scene((1,), seed=6)
    made = made._replace(logits=[level - 200 for level in made.logits])
    t = 1e-87 * 0.5**20
    assert torch.tensor(t) == 0
    ours = assert_equals_paper(path, made, 5, 1.0, 20.0)
    assert ours.num_foreground == 5


@PATHS
def test_anchors_may_differ_between_images(path):
    made = scene((1, 1), seed=7)
    assert_equals_paper(path, made._replace(anchors=torch.stack((made.anchors, made.anchors + 3))))


@PATHS
def test_what_is_no_number_is_background(path):
    """As if those anchors were elsewhere: the others are matched as ever."""
    made = scene((1,), seed=8)
    best = match(path, made).indices[0].nonzero().squeeze(1)
    first, second, third = (match(path, made).indices[0] == 0).nonzero().squeeze(1)[:3].tolist()
    assert third < made.logits[0].shape[1]
    assert len(best)
    logits, deltas = [x.clone() for x in made.logits], [x.clone() for x in made.deltas]
    logits[0][0, first], deltas[0][0, second, 2], logits[0][0, third] = math.nan, math.nan, -math.inf
    ours = match(path, made._replace(logits=logits, deltas=deltas))
    anchors = made.anchors.clone()
    anchors[[first, second, third]] += 1000
    expected = match(path, made._replace(anchors=anchors))
    assert ours.num_foreground == expected.num_foreground == 5
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@PATHS
def test_nothing_at_all(path):
    made = scene((0, 0))
    matches = match(path, made)
    assert (matches.indices == -1).all()
    assert not matches.targets.any()
    none = [torch.zeros(1, 0, 4)]
    empty = Scene(none, none, torch.zeros(0, 4), [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [torch.tensor([1])], 4)
    assert match(path, empty).targets.shape == (1, 0)
    lost = made._replace(images=[torch.tensor([[5000.0, 5000.0, 5010.0, 5010.0]])] * 2, labels=[torch.tensor([1])] * 2)
    assert (match(path, lost).indices == -1).all()


@pytest.mark.parametrize("path", ["reference", pytest.param("kernel", marks=pytest.mark.slow)])
def test_ten_thousand_ground_truths(path, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 1 << 19)
    for name, value in {"_TILE": 128, "_TILES": 16, "_SHARES": 1}.items():  # few loops for the interpreter
        monkeypatch.setattr(aligned_candidates, name, value)
    made, many = scene((10,), seed=9), scene((9_990,), seed=10)
    boxes, labels = torch.cat((many.images[0] + 2000, made.images[0])), torch.cat((many.labels[0], made.labels[0]))
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    near = (order >= 9_990).nonzero().squeeze(1)
    made = made._replace(images=[boxes[order[near]]], labels=[labels[order[near]]])
    index, targets, gap = paper(made, 0, 5, 1.0, 6.0)
    assert gap > 1e-4
    ours = match(path, made._replace(images=[boxes[order]], labels=[labels[order]]))
    assert torch.equal(ours.indices[0].long(), torch.where(index >= 0, near[index.clamp(min=0)], -1))
    torch.testing.assert_close(ours.targets[0].double(), targets, rtol=1e-4, atol=1e-7)


def test_boxes_and_labels_that_cannot_be_stay_in_bounds():
    """On a GPU they are reported at a later call; until then the kernels must live with them."""
    nan, inf = math.nan, math.inf
    boxes = torch.tensor([[nan] * 4, [inf] * 4, [0, 0, nan, 9], [9.0, 9, 3, 3], [5, 5, 5, 5], [-inf, -inf, inf, inf]])
    bad = torch.tensor([[0.0, 0.0, 30.0, 30.0]] * 2)
    made = scene((1,))._replace(images=[torch.cat((boxes, bad))], labels=[torch.tensor([0, 1, 2, 3, 0, 1, -1, 4])])
    indices = match("kernel", made).indices
    assert ((indices >= -1) & (indices < 6)).all()
    with pytest.raises(ValueError, match=r"labels must be in \[0, num_classes = 4\), got -1"):
        match("reference", made)


def arguments(made, device="cpu"):
    boxes, labels = torch.cat(made.images), torch.cat(made.labels)
    offsets = torch.tensor([0] + [len(boxes) for boxes in made.images]).cumsum(0)
    levels = [[level.to(device) for level in levels] for levels in (made.logits, made.deltas)]
    return *levels, *(x.to(device) for x in (made.anchors, boxes, labels, offsets)), made.num_classes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 0}, "top_k must be from 1 to 128, got 0"),
        ({"top_k": 129}, "top_k must be from 1 to 128, got 129"),
        ({"alpha": -1.0}, "alpha must be a number of at least 0, got -1.0"),
        ({"beta": math.nan}, "beta must be a number of at least 0, got nan"),
    ],
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        task_aligned_matching(*arguments(scene()), **changed)


def test_levels_that_do_not_fit_each_other():
    logits, deltas, *others = arguments(scene((1,)))
    with pytest.raises(
        ValueError, match=r"same images and anchors a level, got \[\(1, \[84, 12\]\), \(1, \[12, 84\]\)\]"
    ):
        task_aligned_matching(logits, deltas[::-1], *others)


def test_no_gradient_flows(device):
    logits, deltas, *others = arguments(scene((2,)), device)
    matches = task_aligned_matching([x.requires_grad_() for x in logits], [x.requires_grad_() for x in deltas], *others)
    assert not matches.targets.requires_grad

    def targets(scale):
        return task_aligned_matching([x * scale for x in logits], deltas, *others).targets.sum() * scale

    grad = torch.func.grad(targets)(torch.ones((), device=device))
    torch.testing.assert_close(grad, matches.targets.sum())


def test_registration(device):
    inputs: Any = *arguments(scene((2, 1), seed=11), device), 5, 1.0, 6.0, 0
    torch.library.opcheck(module._reference_op, inputs, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(task_aligned_matching, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, expected in zip(compiled(*inputs), task_aligned_matching_reference(*inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_registration_of_the_kernels(device):
    inputs = *arguments(scene((1,)), device), 5, 1.0, 6.0, 0
    torch.library.opcheck(module._op, inputs, test_utils=("test_schema", "test_faketensor"))


def test_memory_of_many_ground_truths(monkeypatch):
    monkeypatch.undo()
    given: list[Tensor] = []

    def run():
        levels = [torch.empty(1, 120_000, channels, device="cuda") for channels in (3, 4)]
        anchors, boxes = torch.empty(120_000, 4, device="cuda"), torch.empty(500, 4, device="cuda")
        labels = torch.zeros(500, dtype=torch.int64, device="cuda")
        offsets = torch.tensor([0, 500]).to("cuda", non_blocking=True)
        given.extend((*levels, anchors, boxes, labels, offsets))
        task_aligned_matching([levels[0]], [levels[1]], anchors, boxes, labels, offsets, 3)

    seen = {id(x): x for launch in launches_of(run) for x in tree_leaves(launch.args) if isinstance(x, Tensor)}
    size = sum(x.nbytes for x in seen.values()) - sum(x.nbytes for x in given)
    assert 36 * 120_000 < size < 7e6  # a float32 matrix of anchors x ground truths: 240 MB


def test_launches_do_not_grow_with_the_batch():
    assert [launch.kernel.__name__ for launch in launches_of(KERNEL_CALLS["task_aligned_matching bf16"].run)] == [
        "_predict_kernel", "_align_kernel", "_offer_kernel", "_write_matches_kernel", "_target_kernel",
    ]  # fmt: skip


# As compiled code


@pytest.mark.parametrize("name", names("task_aligned_matching"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("task_aligned_matching"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

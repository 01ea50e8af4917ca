"""The postprocess in one operation, against the four operations' references one after another."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast.kernels import batched_nms, candidate_places, candidate_search, nms_tiles, nms_walk
from retina_fast.kernels import postprocess as module
from retina_fast.kernels.postprocess import postprocess, postprocess_by_steps
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import gpu_work_of
from tests.ptx.cases import OTHER_ORDERS, check, names

K = 5
SIZES = torch.tensor([[70, 90], [80, 60]]), torch.tensor([[140, 135], [40, 61]])


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter's time is that of the programs."""
    monkeypatch.setattr(candidate_search, "_SEARCH_PROGRAMS", 8)
    monkeypatch.setattr(candidate_places, "_TILES", ((math.inf, 256, 64, 1),))
    for name in ("_FEWEST_GROUPS", "_MOST_GROUPS"):
        monkeypatch.setattr(nms_walk, name, 2)
    for name, value in (("_TILE", 256), ("_PART", 128), ("_MANY", 10**9), ("_PROGRAMS", 2), ("_GROUPS", 2)):
        monkeypatch.setattr(nms_tiles, name, value)


def inputs(dtype=torch.float32, per_image=False):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 3 * K, h, w, generator=generator) * 2 - 3 for h, w in ((5, 3), (2, 2))]
    deltas = [torch.randn(2, 3 * 4, h, w, generator=generator) * 0.3 for h, w in ((5, 3), (2, 2))]
    corner = torch.rand(2, 57, 2, generator=generator) * 60
    anchors = torch.cat((corner, corner + 8 + torch.rand(2, 57, 2, generator=generator) * 20), dim=2)
    return [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas], anchors if per_image else anchors[0]


def by_kernels(*arguments):
    with mock.patch.object(module, "runs_triton", return_value=True):
        return postprocess(*arguments)


def equal(ours, expected):
    boxes, scores, labels, counts = (field.cpu() for field in ours)
    assert torch.equal(counts, expected[3])
    assert torch.equal(labels, expected[2])
    torch.testing.assert_close(scores, expected[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(boxes, expected[0], rtol=1e-6, atol=1e-4)
    padding = torch.arange(labels.shape[1]) >= counts[:, None]
    assert not boxes[padding].any()
    assert not scores[padding].any()


@pytest.mark.parametrize("walked", [10**9, 0], ids=["walks", "tiles"])
@pytest.mark.parametrize("topk", [10, 10**10])
def test_kernels_match_the_reference(walked, topk, device, monkeypatch, few_programs):
    """All scores count, of which each level has more than topk; walks and tiles; few detections and many."""
    monkeypatch.setattr(batched_nms, "_WALKED", walked)
    for dtype, per_image, most in ((torch.float32, False, 7), (torch.bfloat16, True, 10**6)):
        logits, deltas, anchors = inputs(dtype, per_image)
        rest: Any = (K, 0.05, topk, 0.5, most)
        expected = postprocess_by_steps(logits, deltas, anchors, *SIZES, *rest)
        assert (expected[3] > 5).all()
        placed = [[level.to(device) for level in levels] for levels in (logits, deltas)]
        torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
        try:
            ours = by_kernels(*placed, anchors.to(device), *(size.to(device) for size in SIZES), *rest)
        finally:
            torch.use_deterministic_algorithms(False)
        equal(ours, expected)


def test_of_distributions(device, few_programs):
    logits, _, anchors = inputs()
    generator = torch.Generator().manual_seed(1)
    deltas = [torch.randn(2, 3 * 4 * 6, h, w, generator=generator) for h, w in ((5, 3), (2, 2))]
    rest: Any = (K, 0.05, 10, 0.5, 7, 5)
    expected = postprocess_by_steps(logits, deltas, anchors, *SIZES, *rest)
    placed = [[level.to(device) for level in levels] for levels in (logits, deltas)]
    equal(by_kernels(*placed, anchors.to(device), *(size.to(device) for size in SIZES), *rest), expected)


def test_no_candidate_no_image_no_detection(device, few_programs):
    logits, deltas, anchors = inputs()
    placed = [level.to(device) for level in logits], [level.to(device) for level in deltas], anchors.to(device)
    sizes = [size.to(device) for size in SIZES]
    cases: Any = ((K, 1.0, 10, 0.5, 7), (K, 0.05, 0, 0.5, 7), (K, 0.05, 10, 0.5, 0))
    for rest in cases:
        equal(by_kernels(*placed, *sizes, *rest), postprocess_by_steps(logits, deltas, anchors, *SIZES, *rest))
    empty = [[level[:0] for level in levels] for levels in placed[:2]]
    found = by_kernels(*empty, placed[2], *(size[:0] for size in sizes), K, 0.05, 10, 0.5, 7)
    assert [tuple(field.shape) for field in found] == [(0, 7, 4), (0, 7), (0, 7), (0,)]


def test_errors():
    logits, deltas, anchors = inputs()
    wrong: Any = (
        ({"topk": -1}, "topk"),
        ({"max_detections": -1}, "max_detections"),
        ({"anchors": anchors[1:]}, "anchors"),
        ({"deltas": deltas[:1]}, "anchors"),
        ({"deltas": [level[:1] for level in deltas]}, "deltas"),
        ({"image_sizes": SIZES[0][:1]}, "image_sizes"),
        ({"original_sizes": SIZES[0][:, :1]}, "original_sizes"),
    )
    for change, message in wrong:
        given: dict[str, Any] = {"logits": logits, "deltas": deltas, "anchors": anchors, "image_sizes": SIZES[0]}
        given |= {"original_sizes": SIZES[1], "num_classes": K}
        with mock.patch.object(module, "runs_triton", return_value=True), pytest.raises(ValueError, match=message):
            postprocess(**given | change)


def test_opcheck(device, few_programs):
    logits, deltas, anchors = inputs()
    levels = [[x.permute(0, 2, 3, 1).reshape(2, -1, c).to(device) for x in xs] for xs, c in ((logits, K), (deltas, 4))]
    sizes = [size.to(device) for size in SIZES]
    torch.library.opcheck(module._op, (*levels, anchors.to(device), *sizes, K, 0.05, 10, 0.5, 7, 0))


@pytest.mark.parametrize("batch", [1, 8])
def test_launches(batch):
    """Zeros, a list, three searches, places, suppression, and what is kept."""
    assert len(gpu_work_of(lambda: kernel_calls.detect(torch.bfloat16, batch))) == 8


# As compiled code


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "n=16" in name else name for name in names("postprocess")]
)
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("postprocess"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

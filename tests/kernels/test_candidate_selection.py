"""Candidate selection: the kernels, and the reference, against a plain sort of every score."""

import math
from unittest import mock

import pytest
import torch

from retina_fast.kernels import candidate_list, candidate_places, candidate_search
from retina_fast.kernels import candidate_selection as module
from retina_fast.kernels.candidate_selection import candidate_selection, candidate_selection_reference, logit
from tests.ptx.cases import OTHER_ORDERS, check, names


def by_kernels(logits, num_classes, score_thresh=0.05, topk=1000):
    """By the kernels, whatever the device."""
    with mock.patch.object(module, "runs_triton", return_value=True):
        return candidate_selection(logits, num_classes, score_thresh, topk)


@pytest.fixture(params=["kernel", "cpu"])
def path(request):
    return request.param


@pytest.fixture
def select(path):
    return by_kernels if path == "kernel" else candidate_selection


@pytest.fixture
def place(path, device):
    return device if path == "kernel" else torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles of both kinds in few logits, images off the 16-byte boundaries, several programs a segment."""
    monkeypatch.setattr(candidate_list, "_TILE_BYTES", 256)
    monkeypatch.setattr(candidate_list, "_AT_ONCE", 0)  # with floors
    monkeypatch.setattr(candidate_search, "_SEARCH_TILE", 32)
    monkeypatch.setattr(candidate_search, "_SEARCH_PROGRAMS", 16)
    monkeypatch.setattr(candidate_search, "_SLACK", 1)
    monkeypatch.setattr(candidate_places, "_TILES", ((math.inf, 256, 64, 1),))


def brute_force(levels, k, threshold, topk):
    """Per image, the (anchor, label) pairs in order: higher logit first, then lower index over all levels."""
    images = []
    for b in range(len(levels[0])):
        chosen, first = [], 0
        for level in levels:
            flat = level[b].permute(1, 2, 0).reshape(-1).tolist()
            above = [(-x, i + first) for i, x in enumerate(flat) if 1 / (1 + math.exp(-x)) > threshold]
            chosen += sorted(above)[:topk]
            first += len(flat)
        images.append([(i // k, i % k) for _, i in sorted(chosen)])
    return images


def equal(ours, expected):
    for field in ("counts", "anchors", "labels"):
        assert torch.equal(getattr(ours, field).cpu(), getattr(expected, field).cpu()), field
    torch.testing.assert_close(ours.scores.cpu(), expected.scores.cpu(), rtol=2e-6, atol=0)


# Matches the reference


@pytest.mark.parametrize("topk", [1, 5, 1000])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 7])
def test_matches_brute_force(k, threshold, topk):
    generator = torch.Generator().manual_seed(0)
    levels = [(torch.randn(2, 3 * k, h, w, generator=generator) * 4).round() / 4 for h, w in ((7, 5), (3, 2))]
    ours = candidate_selection(levels, k, threshold, topk)
    for b, expected in enumerate(brute_force(levels, k, threshold, topk)):
        n = int(ours.counts[b])
        assert list(zip(ours.anchors[b, :n].tolist(), ours.labels[b, :n].tolist(), strict=True)) == expected
        assert (ours.labels[b, n:] == -1).all()
        assert (ours.scores[b, n:] == 0).all()
        assert (ours.scores[b, :n] > threshold).all()


@pytest.mark.parametrize(
    ("dtype", "k", "threshold", "topk"),
    [
        (torch.bfloat16, 7, 0.05, 5),
        (torch.float16, 1, 0.0, 3),
        (torch.float32, 7, 0.7, 5),
        (torch.float32, 1, 0.05, 10**12),
        (torch.bfloat16, 7, 0.3, 1),
        (torch.float32, 7, 1.0, 5),
        (torch.bfloat16, 1, 0.3, 0),
    ],
)
def test_kernels_match_the_reference(dtype, k, threshold, topk, device, small_tiles):
    """Rounded logits: many ties, at the last place that stays too. Image 0 has more survivors than its lists hold,
    image 2 none, image 1 some; and every special number."""
    generator = torch.Generator().manual_seed(k)
    levels = [(torch.randn(3, 3 * k, h, w, generator=generator) * 4).round() / 4 for h, w in ((7, 5), (3, 2))]
    for level in levels:
        level[1] -= 6
        level[2] = -float("inf")
        level[:2, 0, 0, 0], level[:2, 0, 0, 1] = float("inf"), float("nan")
        level[:2, 1, :, 0], level[:2, 1, :, 1], level[1, 2] = 0.0, -0.0, -float("nan")
    levels = [level.to(device, dtype).to(memory_format=torch.channels_last) for level in levels]
    equal(by_kernels(levels, k, threshold, topk), candidate_selection_reference(levels, k, threshold, topk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["near zero", "two near zero", "very high", "very low", "equal", "a few"])
def test_values_that_share_a_bin(values, dtype, device, monkeypatch):
    """Where one of the first bins has more keys than there is room for, they are counted in finer ones."""
    monkeypatch.setattr(candidate_search, "_SEARCH_PROGRAMS", 2)
    monkeypatch.setattr(candidate_places, "_TILES", ((math.inf, 256, 64, 1),))
    noise = torch.randn(1, 3000, 1, generator=torch.Generator().manual_seed(0))
    level = {
        "near zero": noise * 1e-3, "two near zero": 1e-3 + (noise > 0) * 1e-9, "very high": 200 + noise,
        "very low": noise - 200, "equal": noise * 0 - 1.25, "a few": (noise * 2).round() / 8,
    }[values].to(device, dtype)  # fmt: skip
    for topk in (1, 7, 300):
        equal(by_kernels([level], 1, 0.0, topk), candidate_selection_reference([level], 1, 0.0, topk))


@pytest.mark.parametrize("fraction", [0.01, 0.2])
def test_the_real_tile_sizes(fraction, device):
    """At 1% above the threshold from the lists, at 20% by reading the logits again."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.rand(2, 9 * 11, n, n, generator=generator) for n in (17, 5)]
    levels = [torch.logit(level * 0.05 / (1 - fraction), eps=1e-4).bfloat16().to(device) for level in levels]
    equal(by_kernels(levels, 11, 0.05, 30), candidate_selection_reference(levels, 11, 0.05, 30))


def test_agrees_with_torchvision_on_what_is_above_the_threshold():
    """sigmoid(x) > t and x > logit(t) may differ only where the score is t but for rounding."""
    logits = torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0)) * 4
    ours = candidate_selection([logits], 1, 0.05, 20_000)
    above = torch.sigmoid(logits).flatten() > 0.05
    found = torch.zeros_like(above)
    found[ours.anchors[0, : int(ours.counts[0])]] = True
    scores = torch.sigmoid(logits).flatten()
    assert torch.equal(found | ((scores - 0.05).abs() < 1e-7), above | ((scores - 0.05).abs() < 1e-7))
    assert found.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 5, 64, 64 * 3, 64 * 40 + 17])
@pytest.mark.parametrize("topk", [0, 1, 7, 100])
def test_the_reference_misses_nothing_in_long_rows(length, topk, dtype):
    """Against a sort of all, with ties, infinities and a NaN in every third stretch of 64."""
    flat = (torch.randn(length, generator=torch.Generator().manual_seed(length)) * 4).round().div(4).to(dtype)
    flat[5::192], flat[70::640], flat[71::640] = float("nan"), float("inf"), -float("inf")
    for score_thresh in (0.0, 0.5, 0.9, 1.0):
        values = flat.float().nan_to_num(-float("inf"), posinf=float("inf"), neginf=-float("inf"))
        falling = values.sort(descending=True, stable=True).indices.tolist()
        order = [i for i in falling if values[i] > logit(score_thresh)]
        ours = candidate_selection_reference([flat.reshape(1, -1, 1)], 1, score_thresh, topk)
        assert ours.counts.tolist() == [len(order[:topk])]
        assert ours.anchors[0, : len(order[:topk])].tolist() == order[:topk]


# Gradients


def test_the_reference_takes_logits_that_require_gradients():
    logits = [torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))]
    expected = candidate_selection_reference(logits, 3, 0.05, 20)
    found = candidate_selection_reference([logits[0].requires_grad_()], 3, 0.05, 20)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_scores_are_differentiable():
    logits = (torch.randn(2, 3 * 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    ours = candidate_selection([logits], 2, 0.3, 9)
    (grad,) = torch.autograd.grad((ours.scores * torch.arange(9)).sum(), logits)
    scores = torch.sigmoid(logits).permute(0, 2, 3, 1).reshape(2, -1).sort(dim=1, descending=True).values[:, :9]
    (expected,) = torch.autograd.grad((scores * torch.arange(9)).sum(), logits)
    torch.testing.assert_close(grad, expected)
    with torch.no_grad():
        assert not candidate_selection([logits], 2).scores.requires_grad


# Edges


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.float16))]
)
def test_a_million_equal_scores_go_by_index(dtype, select, place, monkeypatch):
    """On a GPU, and on a CPU by its own path; interpreted, a fifth of them."""
    interpreted = place.type == "cpu" and select is by_kernels
    if place.type == "cpu":
        monkeypatch.setattr(candidate_search, "_SEARCH_TILE", 1 << 17)
        monkeypatch.setattr(candidate_search, "_SEARCH_PROGRAMS", 1)
    count = 200_000 if interpreted else 1_000_000
    ours = select([torch.zeros(1, count, 1, dtype=dtype, device=place)], 1, 0.05, 1000)
    assert ours.counts.tolist() == [1000]
    assert torch.equal(ours.anchors[0].cpu(), torch.arange(1000))
    assert (ours.scores == 0.5).all()


@pytest.mark.parametrize("score_thresh", [0.0, 0.9])
def test_more_candidates_than_the_kernels_sort(score_thresh, select, place):
    """Up to 9000 an image, in two images of which one has none."""
    logits = torch.randn(2, 3000, 3, generator=torch.Generator().manual_seed(0))
    logits[1] = -float("inf")
    ours = select([logits.to(place)], 3, score_thresh, 10**10)
    expected = candidate_selection_reference([logits], 3, score_thresh, 10**10)
    assert ours.anchors.shape == (2, 9000)
    assert ours.counts.tolist() == [int((torch.sigmoid(logits[0]) > score_thresh).sum()), 0]
    equal(ours, expected)


def test_nothing_above_and_not_a_number(select, place, small_tiles):
    nothing = select([torch.full((2, 9, 4, 4), -9.0, device=place)], 3)
    assert nothing.counts.tolist() == [0, 0]
    level = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")], device=place).reshape(1, 4, 1)
    ours = select([level], 1, 0.0)
    assert ours.anchors[0, :2].tolist() == [2, 1]
    assert ours.counts.tolist() == [2]


def test_an_empty_batch_and_an_empty_level(select, place, small_tiles):
    empty = select([torch.empty(0, 9, 4, 4, device=place)], 3)
    assert [tuple(field.shape) for field in empty] == [(0, 144), (0, 144), (0, 144), (0,)]
    levels = [torch.zeros(1, 9, 2, 1, device=place), torch.empty(1, 9, 0, 4, device=place)]
    assert select(levels, 3).counts.tolist() == [18]
    assert select(levels[1:], 3).anchors.shape == (1, 1)


def test_scores_are_float32_whatever_the_logits(select, place):
    logits = torch.linspace(-2, 6, 64).reshape(1, 64, 1).bfloat16().to(place)
    ours = select([logits], 1)
    torch.testing.assert_close(ours.scores[0], torch.sigmoid(logits.float()).flatten().flip(0), rtol=2e-6, atol=0)


def test_every_output_is_written_and_the_result_is_deterministic(device, small_tiles):
    levels = [torch.randn(2, 9, 5, 5, device=device)]
    torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
    try:
        first, second = by_kernels(levels, 3, 0.4, 7), by_kernels(levels, 3, 0.4, 7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    equal(first, candidate_selection_reference(levels, 3, 0.4, 7))


def test_errors():
    with pytest.raises(ValueError, match=r"A\*4"):
        candidate_selection([torch.zeros(1, 9, 2, 2)], 4)
    with pytest.raises(ValueError, match="dtype"):
        candidate_selection([torch.zeros(1, 9, 3), torch.zeros(1, 9, 3).half()], 3)
    with pytest.raises(ValueError, match="topk"):
        candidate_selection([torch.zeros(1, 9, 3)], 3, topk=-1)
    with pytest.raises(ValueError, match=r"2\^30"):
        candidate_selection([torch.empty(1, 2**28, 8, device="meta")], 8)


# Registration


def test_opcheck(device, small_tiles):
    levels = [torch.randn(2, n, 3, device=device) for n in (20, 5)]
    torch.library.opcheck(module._op, (levels, 3, 0.3, 4))
    torch.library.opcheck(module._reference_op, (levels, 3, 0.3, 4))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_whole(dynamic, device, small_tiles):
    levels = [torch.randn(2, 9, n, n, device=device) for n in (4, 2)]
    compiled = torch.compile(candidate_selection, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    equal(compiled(levels, 3, 0.4, 7), candidate_selection_reference(levels, 3, 0.4, 7))


# As compiled code


@pytest.mark.parametrize("name", names("candidate_selection"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("candidate_selection"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

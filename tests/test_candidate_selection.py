"""Candidate selection against a plain sort of every score."""

import math

import pytest
import torch

from retina_fast.kernels.candidate_selection import candidate_selection


def brute_force(levels, k, threshold, topk):
    """Per image, the (anchor, label) pairs in order: level by level, higher logit first, then lower index."""
    images = []
    for b in range(len(levels[0])):
        chosen, first = [], 0
        for level in levels:
            flat = level[b].permute(1, 2, 0).reshape(-1).tolist()
            above = [(-x, i) for i, x in enumerate(flat) if 1 / (1 + math.exp(-x)) > threshold]
            chosen += [(i // k + first, i % k) for _, i in sorted(above)[:topk]]
            first += len(flat) // k
        images.append(chosen)
    return images


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_million_equal_scores_go_by_index(dtype):
    ours = candidate_selection([torch.zeros(1, 1_000_000, 1, dtype=dtype)], 1, 0.05, 1000)
    assert ours.counts.tolist() == [1000]
    assert torch.equal(ours.anchors[0], torch.arange(1000))
    assert (ours.scores == 0.5).all()


def test_nothing_above_and_not_a_number():
    nothing = candidate_selection([torch.full((2, 9, 4, 4), -9.0)], 3)
    assert nothing.counts.tolist() == [0, 0]
    level = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")]).reshape(1, 4, 1)
    ours = candidate_selection([level], 1, 0.0)
    assert ours.anchors[0, :2].tolist() == [2, 1]
    assert ours.counts.tolist() == [2]


def test_scores_are_float32_whatever_the_logits():
    logits = torch.linspace(-2, 6, 64).reshape(1, 64, 1).bfloat16()
    ours = candidate_selection([logits], 1)
    assert torch.equal(ours.scores[0], torch.sigmoid(logits.float()).flatten().flip(0))

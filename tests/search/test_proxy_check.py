"""The check of a score: tau against a plain count, its interval against its own coverage, and scores that are kept."""

import math
import random
from itertools import combinations

import pytest

from retina_fast.backbones.specification import SPINENET
from retina_fast.search.proxy_check import compare, kendall_tau, measure


def test_tau_is_the_part_of_pairs_in_the_same_order_less_the_others():
    rng = random.Random(0)
    for _ in range(20):
        x, y = ([rng.random() for _ in range(12)] for _ in range(2))
        agreeing = sum((x[i] < x[j]) == (y[i] < y[j]) for i, j in combinations(range(12), 2))
        assert kendall_tau(x, y).value == pytest.approx(2 * agreeing / 66 - 1)
    assert kendall_tau(range(6), range(6)) == (1, 1, 1)
    assert kendall_tau(range(6), range(5, -1, -1)) == (-1, -1, -1)


def test_ties():
    """By hand: 10 pairs, of which 1 is tied in x, 3 in y, none in both; 6 are left, all in the same order."""
    assert kendall_tau([1, 1, 2, 3, 4], [1, 2, 3, 3, 3]).value == pytest.approx(6 / math.sqrt(9 * 7))


def test_the_interval_covers_the_true_value():
    """Of a normal pair with correlation r, tau is 2/pi asin(r)."""
    rng = random.Random(0)
    r, inside = 0.7, 0
    for _ in range(300):
        x = [rng.gauss(0, 1) for _ in range(15)]
        y = [r * a + math.sqrt(1 - r * r) * rng.gauss(0, 1) for a in x]
        tau = kendall_tau(x, y)
        inside += tau.low <= 2 / math.pi * math.asin(r) <= tau.high
    assert 0.90 < inside / 300 < 0.99
    narrow, wide = kendall_tau(x, y, 0.5), kendall_tau(x, y)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="at least 5, got 4 and 4"):
        kendall_tau(range(4), range(4))
    with pytest.raises(ValueError, match="all equal"):
        kendall_tau([1.0] * 6, range(6))
    with pytest.raises(ValueError, match="at least 10 networks, got 9"):
        compare([[1.0]] * 9, [[1.0]] * 9)


def test_noise_of_seeds_beside_the_spread_of_networks():
    rng = random.Random(1)
    proxy = [[10 * i + rng.gauss(0, 3) for _ in range(50)] for i in range(12)]
    check = compare(proxy, [[i] for i in range(12)])
    assert check.within == pytest.approx(3, rel=0.1)
    assert check.between == pytest.approx(10 * math.sqrt(13), rel=0.05)
    assert (check.tau.value, check.networks, check.seeds) == (1, 12, 50)
    assert math.isnan(compare([[i] for i in range(12)], [[i] for i in range(12)]).within)


def test_scores_are_kept_as_they_come(tmp_path):
    asked = []

    def scorer(blocks, seed):
        asked.append(seed)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return float(seed + len(blocks))

    specifications = [SPINENET, SPINENET[:1]]
    with pytest.raises(KeyboardInterrupt):
        measure(specifications, scorer, [0, 1], tmp_path / "scores.json")
    seen: list[int] = []
    assert measure(specifications, scorer, [0, 1], tmp_path / "scores.json", seen.append) == [[15, 16], [1, 2]]
    assert asked == [0, 0, 1, 1, 1]
    assert seen[-1] == 4

"""Whether a score is to be believed: how its order of networks agrees with that of longer training, and its noise.

Google's guide to its search asks for both before a search is begun, with at least ten networks
(https://github.com/google/vertex-ai-nas, `proxy_task`).
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from retina_fast.backbones.specification import Block
from retina_fast.data.files import replacing

LEAST = 10
"""Networks that a check needs."""
_NORMAL = statistics.NormalDist()

Scorer = Callable[[Sequence[Block], int], float]
"""From a specification and a seed to a score; more is better."""


class Tau(NamedTuple):
    """A rank correlation with its confidence interval."""

    value: float
    low: float
    high: float


def kendall_tau(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Tau:
    """Kendall's tau-b of two orders, which counts ties in neither's favour.

    Its interval is Fieller, Hartley and Pearson's (1957): atanh(tau) has a variance of about 0.437 / (n - 4).

    Args:
        x, y: n values each, n at least 5, the same networks in the same order.
        confidence: of the interval.

    Raises:
        ValueError: for lengths that differ, fewer than 5 values, or values that are all equal.

    Example::

        >>> tau = kendall_tau(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 9, 8])
        >>> [round(value, 2) for value in tau]
        [0.96, 0.88, 0.98]
    """
    if len(x) != len(y) or len(x) < 5:
        raise ValueError(f"x and y must have the same number of values, at least 5, got {len(x)} and {len(y)}")
    pairs = list(combinations(zip(x, y, strict=True), 2))
    signs = [(_sign(a - c), _sign(b - d)) for (a, b), (c, d) in pairs]
    both = sum(first * second for first, second in signs)
    apart = [sum(abs(sign[side]) for sign in signs) for side in (0, 1)]
    if not all(apart):
        raise ValueError("the values of x or of y are all equal: they have no order")
    value = both / math.sqrt(apart[0] * apart[1])
    if abs(value) == 1:
        return Tau(value, value, value)
    reach = _NORMAL.inv_cdf((1 + confidence) / 2) * math.sqrt(0.437 / (len(x) - 4))
    return Tau(value, math.tanh(math.atanh(value) - reach), math.tanh(math.atanh(value) + reach))


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


class ProxyCheck(NamedTuple):
    """What a check of a score found."""

    tau: Tau
    """Of the means over seeds."""
    between: float
    """Standard deviation of the networks' means."""
    within: float
    """Standard deviation over the seeds of one network, pooled; NaN with one seed."""
    networks: int
    seeds: int


def compare(proxy: Sequence[Sequence[float]], longer: Sequence[Sequence[float]]) -> ProxyCheck:
    """Compare a score with longer training.

    Args:
        proxy: for each network, its scores by seed, equally many of each.
        longer: the same of the longer training, with any number of seeds.

    Raises:
        ValueError: for fewer than ten networks, or what has no order.

    Example::

        >>> check = compare([[i, i + 0.1] for i in range(10)], [[2 * i] for i in range(10)])
        >>> check.tau.value, round(check.between, 1), round(check.within, 2)
        (1.0, 3.0, 0.07)
    """
    if len(proxy) < LEAST:
        raise ValueError(f"a score must be compared on at least {LEAST} networks, got {len(proxy)}")
    means = [statistics.fmean(scores) for scores in proxy]
    tau = kendall_tau(means, [statistics.fmean(scores) for scores in longer])
    seeds = len(proxy[0])
    within = math.sqrt(statistics.fmean(statistics.variance(scores) for scores in proxy)) if seeds > 1 else math.nan
    return ProxyCheck(tau, statistics.stdev(means), within, len(proxy), seeds)


def measure(
    specifications: Sequence[Sequence[Block]],
    scorer: Scorer,
    seeds: Sequence[int],
    file: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """The scores of specifications by seed, each kept in a file as soon as it is there; a second call goes on.

    Args:
        specifications: checked ones.
        scorer: gives a score.
        seeds: with which each is scored.
        file: JSON, of this list of specifications alone.
        progress: is told how many scores there are.

    Raises:
        UserError: if the file cannot be written.

    Example::

        >>> measure([SPINENET], lambda blocks, seed: 1.0, [0, 1], Path("scores.json"))  # doctest: +SKIP
        [[1.0, 1.0]]
    """
    known = json.loads(file.read_text()) if file.exists() else {}
    for seed in seeds:  # one seed of every network before the next, so that an end too early leaves whole columns
        for number, blocks in enumerate(specifications):
            key = f"{number}:{seed}"
            if key not in known:
                known[key] = scorer(blocks, seed)
                with replacing(file) as partial:
                    partial.write_text(json.dumps(known))
            progress(len(known))
    return [[known[f"{number}:{seed}"] for seed in seeds] for number in range(len(specifications))]

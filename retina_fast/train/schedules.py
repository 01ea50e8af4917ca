"""Learning rate schedules: each gives the factor of the peak rate at a step of `total` steps."""

import math
from collections.abc import Mapping


def warmup_cosine(step: int, total: int) -> float:
    """Rises in the first 5% of the steps, then falls to a hundredth along a cosine.

    Example::

        >>> [round(warmup_cosine(step, total=100), 2) for step in (0, 4, 99)]
        [0.2, 1.0, 0.01]
    """
    warmup = max(1, round(total * 0.05))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def warmup_drops(step: int, total: int, warmup: float, start: float, drops: Mapping[float, float]) -> float:
    """Rises from `start` to 1 in the first `warmup` of the steps, then falls to the factor of each drop in turn.

    Args:
        step: 0 to total - 1.
        total: the number of steps.
        warmup: the part of the steps in which the rate rises.
        start: the factor at step 0.
        drops: the factor from each part of the steps on.

    Example::

        >>> [warmup_drops(step, 100, warmup=0.1, start=0.0, drops={0.6: 0.1, 0.9: 0.01}) for step in (5, 10, 60, 99)]
        [0.5, 1.0, 0.1, 0.01]
    """
    done = step / total
    if done < warmup:
        return start + (1 - start) * done / warmup
    return min((factor for begin, factor in drops.items() if done >= begin), default=1.0)


def epoch_drops(step: int, total: int, epochs: int, drops: tuple[int, ...], warmup: int, start: float = 1e-3) -> float:
    """Rises from `start` to 1 in `warmup` steps, then falls to a tenth after each epoch of `drops`.

    It rises in the first epoch, if that has fewer steps.

    Args:
        step: 0 to total - 1.
        total: the number of steps.
        epochs: how many of equal length they are.
        drops: epochs, of which the first is 1.
        warmup: a number of steps.
        start: the factor at step 0.

    Example::

        >>> [epoch_drops(step, 12_000, epochs=12, drops=(8, 11), warmup=500) for step in (0, 2000, 8000, 11_000)]
        [0.001, 1.0, 0.1, 0.01]
    """
    factors = {epoch / epochs: 10.0**-n for n, epoch in enumerate(drops, start=1)}
    return warmup_drops(step, total, min(warmup, total // epochs - 1) / total, start, factors)

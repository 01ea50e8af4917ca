"""The learning rate at every step is that of the published programs."""

from collections.abc import Iterator

import pytest
import torch

from retina_fast.train.recipes import recipe_named
from retina_fast.train.schedules import warmup_cosine

# published: steps, first and second drop, peak rate (tensorflow/tpu, 463 steps an epoch)
SCHEDULES = {
    "spinenet-b": (162_050, 148_160, 157_420, 0.28),
    "spinenet-c": (231_500, 217_610, 226_870, 0.28),
    "spinenet-c-143": (231_500, 217_610, 226_870, 0.28),
    "spinenet-c-190": (185_200, 171_310, 180_570, 0.30),
    "spinenet-mobile": (277_800, 263_910, 273_170, 0.28),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_the_published_ones(name):
    recipe, (total, first, second, peak) = recipe_named(name), SCHEDULES[name]
    assert recipe.lr_at(256) == peak
    rates = {step: peak * recipe.schedule(step, total=total) for step in
             (0, 1000, 2000, 100_000, first - 1, first + 1, second - 1, second + 1, total - 1)}  # fmt: skip
    low = 0.0067 * peak / 0.28
    expected = [low, (low + peak) / 2, peak, peak, peak, peak / 10, peak / 10, peak / 100, peak / 100]
    assert list(rates.values()) == pytest.approx(expected)


def test_learning_rate_rises_and_falls_to_a_hundredth():
    rates = [warmup_cosine(step, 100) for step in range(100)]
    assert rates.index(max(rates)) in (4, 5)
    assert max(rates) == 1
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert [warmup_cosine(0, total) for total in (1, 2)] == [1, 1]


def published_rates(
    lr: float, epoch_steps: int, epochs: int = 26, drops: tuple[int, int] = (16, 22), warmup: int = 1000,
    start: float = 1 / 1000,
) -> Iterator[float]:  # fmt: skip
    """The rate of each step, by PyTorch's schedulers: those of torchvision's reference for `--epochs 26 --lr-steps 16
    22`, and others."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    dropping = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[*drops], gamma=0.1)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start, total_iters=min(warmup, epoch_steps - 1))
    for epoch in range(epochs):
        for _ in range(epoch_steps):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            if epoch == 0:
                rising.step()
        dropping.step()


@pytest.mark.parametrize("epoch_steps", [1500, 40])
@pytest.mark.parametrize("recipe", ["torchvision-v1", "torchvision-v2"])
def test_the_rate_of_every_step_is_torchvisions(recipe, epoch_steps):
    chosen = recipe_named(recipe)
    lr = chosen.lr_at(16)
    assert lr == {"torchvision-v1": 0.01, "torchvision-v2": 1e-4}[recipe]
    total = chosen.steps_for(16 * epoch_steps + 9, 16)
    rates = [lr * chosen.schedule(step, total=total) for step in range(total)]
    assert rates == pytest.approx(list(published_rates(lr, epoch_steps)), rel=1e-9)
    assert rates[0] == lr / 1000
    assert rates[min(1000, epoch_steps - 1)] == lr


@pytest.mark.parametrize("epoch_steps", [600, 40])
@pytest.mark.parametrize(
    ("recipe", "epochs", "drops", "start"),
    [("atss-1x", 12, (8, 11), 1 / 1000), ("gfl-2x", 24, (16, 22), 1 / 1000), ("tood-1x", 12, (8, 11), 1 / 1000),
     ("vfnet-1x", 12, (8, 11), 0.1), ("vfnet-2x", 24, (16, 22), 0.1)],
)  # fmt: skip
def test_the_rate_of_every_step_is_mmdetections(recipe, epochs, drops, start, epoch_steps):
    chosen = recipe_named(recipe)
    assert (chosen.lr_at(16), chosen.weight_decay, chosen.gradient_norm) == (0.01, 1e-4, None)
    total = chosen.steps_for(16 * epoch_steps + 9, 16)
    rates = [0.01 * chosen.schedule(step, total=total) for step in range(total)]
    assert rates == pytest.approx(list(published_rates(0.01, epoch_steps, epochs, drops, 500, start)), rel=1e-9)

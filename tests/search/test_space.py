"""The space: every sample is valid, numbers and rows are the same thing, and costs are those of the built network."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retina_fast.backbones.specification import MOBILE_KINDS, MOBILE_SPINENET, SPINENET, Block, checked
from retina_fast.backbones.spinenet import SIZES, Size, SpineNet
from retina_fast.backbones.spinenet_mobile import MOBILE_SIZES, MobileSize, MobileSpineNet
from retina_fast.builders import MODELS
from retina_fast.heads import run_head
from retina_fast.search.cost import cost
from retina_fast.search.space import (
    MOBILE,
    PAPER,
    PUBLIC,
    SPACES,
    Space,
    lehmer_decode,
    lehmer_encode,
    pair_of,
    rank_of,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def kinds(space: Space) -> Any:
    return {"kinds": MOBILE_KINDS} if space is MOBILE else {}


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_samples_are_valid_and_return_from_their_numbers(count):
    rng = random.Random(0)
    seen = set()
    for i in range(count):
        space = (PAPER, PUBLIC, MOBILE)[i % 3]
        rows = space.decode(space.sample(rng))
        assert checked(rows, **kinds(space)) == rows
        if i < 500 or count > 2000:
            assert space.decode(space.encode(rows)) == rows
        seen.add(rows)
    assert len(seen) == count


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_samples_keep_to_the_space(space):
    rng = random.Random(1)
    for _ in range(50):
        rows = space.decode(space.sample(rng))
        middle = len(space.levels)
        assert sorted(block.level for block in rows[middle:]) == [3, 4, 5, 6, 7]
        for row, block in enumerate(rows[:middle]):
            assert not block.is_output
            assert min(block.parents) >= row + 2 - space.window
        levels = sorted(block.level for block in rows[:middle])
        assert all(-1 <= ours - before <= 2 for ours, before in zip(levels, space.levels, strict=True))
    sizes = space.sizes
    assert math.prod(sizes[f"order_{i}"] for i in range(middle - 1)) == math.factorial(middle)
    assert {block.kind for block in rows} <= set(space.kinds)


def test_the_published_permutations_are_points():
    for space, rows in ((PAPER, SPINENET), (MOBILE, MOBILE_SPINENET)):
        assert space.decode(space.encode(rows)) == rows
        turned = [block._replace(parents=block.parents[::-1]) for block in rows]
        assert space.decode(space.encode(turned)) == rows
    without_limits = Space(PAPER.levels, PAPER.shifts)
    # As the paper counts: 2 parents of each of the 15 blocks, 4 shifts of 10, 2 kinds of 15, two orders.
    parents = math.prod(math.comb(i, 2) for i in range(2, 17))
    assert without_limits.count == parents * 4**10 * 2**15 * math.factorial(10) * math.factorial(5)
    assert math.factorial(10) * math.factorial(5) == pytest.approx(4.35e8, rel=2e-3)


def test_what_is_no_point_is_refused():
    with pytest.raises(ValueError, match="11 intermediate blocks and then 5 outputs"):
        PUBLIC.encode(SPINENET)
    with pytest.raises(ValueError, match="row 0: the space has no block that a shift brings to level 2"):
        Space((4,) * 10, PAPER.shifts).encode(SPINENET)
    with pytest.raises(ValueError, match="row 1: the space has no block of kind residual"):
        Space(PAPER.levels, PAPER.shifts, ("bottleneck",)).encode(SPINENET)
    with pytest.raises(ValueError, match="row 1: parent 0 is not among the 2 blocks before it"):
        Space(PAPER.levels, PAPER.shifts, window=2).encode(SPINENET)
    point = PAPER.encode(SPINENET)
    changes: Any = ({"kind_3": 2}, {"parents_14": 120}, {"order_0": None}, {"shift_0": -1})
    for change in changes:
        (name,) = change
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 0 to"):
            PAPER.decode(point | change)


def test_a_block_that_nothing_uses_takes_a_place_that_can_be_spared():
    """Points of a small space, whose rows before the repair are read off its numbers."""
    space = Space((2, 2), kinds=("residual",))
    repaired = 0
    names = [name for name in space.sizes if name.startswith("parents")]
    for ranks in itertools.islice(itertools.product(*(range(space.sizes[name]) for name in names)), 0, None, 997):
        point = dict.fromkeys(space.sizes, 0) | dict(zip(names, ranks, strict=True))
        rows = space.decode(point)
        checked(rows)
        drawn = [(0, 1), *map(pair_of, ranks)]
        different = sum(block.parents != parents for block, parents in zip(rows, drawn, strict=True))
        assert different <= 2
        repaired += different > 0
    assert repaired > 3


def test_codes():
    for permutation in itertools.permutations(range(4)):
        assert lehmer_decode(lehmer_encode(permutation)) == list(permutation)
    assert len({tuple(lehmer_decode(code)) for code in itertools.product(range(4), range(3), range(2))}) == 24
    assert [pair_of(rank) for rank in range(45)] == sorted(itertools.combinations(range(10), 2), key=lambda x: x[::-1])
    assert [rank_of(*pair_of(rank)) for rank in range(200)] == list(range(200))


def built_cost(model: Any, side: int) -> tuple[int, float]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_head(model.head, list(model.backbone(torch.empty(1, 3, side, side)).values()))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_cost_of_a_published_detector(size):
    with torch.device("meta"):
        model = MODELS[f"retinanet_spinenet{size}"](num_classes=7).eval()
        assert cost(SPINENET, SIZES[size], 7, 640) == built_cost(model, 640)


@pytest.mark.parametrize(
    ("space", "count"), [("paper", 1), ("mobile", 1), *(pytest.param(x, 10, marks=pytest.mark.slow) for x in SPACES)]
)
def test_the_cost_of_samples(space, count):
    rng = random.Random(2)
    size: Any
    for _ in range(count):
        rows = SPACES[space].decode(SPACES[space].sample(rng))
        name, size = "49", Size(rng.uniform(0.1, 1), rng.uniform(0.2, 1), rng.choice([2, 3]), 24, 16, 2, 128, 3)
        if count == 1:
            size = size._replace(width=0.25)  # where the first block's shortcut needs no conv
        if space == "mobile":
            name, size = "49_mobile", MobileSize(rng.uniform(0.1, 1), 24, 128, 3)
        with torch.device("meta"):
            model = MODELS[f"retinanet_spinenet{name}"](num_classes=3, specification=rows, size=size).eval()
            assert cost(rows, size, 3) == built_cost(model, 128)


def test_a_size_of_the_other_family_is_refused():
    with pytest.raises(ValueError, match="size must be a MobileSize, got Size"):
        cost(MOBILE_SPINENET, SIZES["49"])
    with pytest.raises(ValueError, match="size must be a Size, got MobileSize"):
        cost(SPINENET, MOBILE_SIZES["49"])


def run_both_ways(rows: tuple[Block, ...], space: Space) -> None:
    kwargs: Any = {"width": 0.05, "out_channels": 4}
    net = MobileSpineNet(rows, **kwargs) if space is MOBILE else SpineNet(rows, **kwargs)
    levels = net(torch.rand(2, 3, 128, 128))
    assert [level.shape[2] for level in levels.values()] == [16, 8, 4, 2, 1]
    torch.stack([level.square().sum() for level in levels.values()]).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_samples_run_forward_and_backward(count):
    """Each parameter has a gradient: no block computes for nothing."""
    rng = random.Random(3)
    for i in range(count):
        space = (PAPER, PUBLIC, MOBILE)[i % 3]
        run_both_ways(space.decode(space.sample(rng)), space)

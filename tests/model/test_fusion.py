"""The factors of a block's two links, fixed or learned, and alphas of their own."""

import json
import random
from typing import Any

import pytest
import torch
from torch import nn

import retina_fast
from retina_fast.backbones.specification import MOBILE_KINDS, MOBILE_SPINENET, SPINENET, Block, as_rows, checked
from retina_fast.backbones.spinenet import SIZES, SpineNet
from retina_fast.backbones.spinenet_mobile import MobileSpineNet
from retina_fast.deploy.fusion.fold import fold_batch_norm
from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.search.cost import cost
from retina_fast.search.score import entropies, entropy_score
from retina_fast.search.space import PAPER, Space


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def changed(row: int, rows: Any = SPINENET, **changes: Any) -> tuple[Block, ...]:
    return tuple(block._replace(**changes) if i == row else block for i, block in enumerate(rows))


def tiny(rows: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    kwargs = {"width": 0.05, "out_channels": 8, **kwargs}
    return SpineNet(rows, **kwargs).eval()


def levels_of(net: nn.Module) -> list[torch.Tensor]:
    return list(net(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))).values())


def test_a_factor_of_one_is_the_plain_sum_bit_by_bit():
    published = tiny(SPINENET)
    assert not [name for name in published.state_dict() if "fusion" in name]
    for rows in (changed(3, fusion=(1.0, 1.0)), changed(3, alphas=(0.5, 0.5))):
        same = tiny(rows)
        assert all(torch.equal(*pair) for pair in zip(levels_of(published), levels_of(same), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", [SpineNet, MobileSpineNet])
def test_each_link_is_multiplied_by_its_factor(family):
    rows = MOBILE_SPINENET if family is MobileSpineNet else SPINENET
    net: Any = family(changed(4, rows, fusion=(0.25, 2)), width=0.1, out_channels=8).eval()
    seen = {}
    for number, block in enumerate(net.blocks):
        block.register_forward_hook(lambda module, x, y, number=number: seen.update({number: (x[0], y)}))
    levels_of(net)
    a, b = (link(seen[parent][1]) for link, parent in zip(net.links[4], rows[4].parents, strict=True))
    torch.testing.assert_close(seen[6][0], net.act(0.25 * a + 2 * b))


def test_learned_factors_are_normalised_and_trained():
    net = tiny(changed(4, fusion="learned"))
    parents = [torch.rand(1, net.blocks[x].channels, 8, 8) for x in SPINENET[4].parents]
    a, b = (link(parent) for link, parent in zip(net.links[4], parents, strict=True))
    with torch.no_grad():
        net.fusions["4"].copy_(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(net.join(4, parents), (a + 3 * b) / 4, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        net.fusions["4"][0] = -1.0
    torch.testing.assert_close(net.join(4, parents), b, rtol=1e-4, atol=1e-6)  # relu
    with torch.no_grad():
        net.fusions["4"].fill_(1.0)
    torch.stack([level.square().sum() for level in levels_of(net)]).sum().backward()
    assert net.fusions["4"].grad.abs().min() > 0


def test_alphas_are_the_widths_inside_the_links():
    with torch.device("meta"):
        net = tiny(changed(3, alphas=(0.25, 1.0)), width=1.0)
    a, b = net.links[3]  # from blocks 2 and 4, of 64 and 128 channels inside
    assert (a[0][0].out_channels, b[0][0].out_channels) == (16, 128)
    other, *_ = net.links[4]
    assert other[0][0].out_channels == 256 // 2


@pytest.mark.parametrize(
    "change",
    [
        {"fusion": "learned"},
        {"fusion": (0.5, 2.0)},
        {"alphas": (0.25, 1.0)},
        {"fusion": "learned", "alphas": (1.0, 0.3)},
    ],
)
def test_costs_files_and_scores(change):
    rows = changed(5, **change)
    assert checked(json.loads(json.dumps(as_rows(rows)))) == rows
    with torch.device("meta"):
        model = retina_fast.retinanet_spinenet49s(num_classes=3, specification=as_rows(rows))
    assert cost(rows, SIZES["49s"], 3).parameters == sum(p.numel() for p in model.parameters())
    before, after = entropy_score(SPINENET, SIZES["49"]), entropy_score(rows, SIZES["49"])
    assert after != before
    assert after < before or "alphas" in change or change["fusion"] == (0.5, 2.0)
    # Block 7 is added to P5 by its link to block 14 alone: P4 and P3 do not see it but through block 8.
    assert entropies(rows, SIZES["49"])[7] != entropies(SPINENET, SIZES["49"])[7]


@torch.no_grad()
def test_the_engine_leaves_such_a_sum_as_it_is():
    rows = changed(4, changed(6, fusion="learned"), fusion=(0.5, 2.0))
    net = tiny(rows, width=0.1)
    x = torch.rand(1, 3, 128, 128)
    fold_batch_norm(net, lambda: list(net(x).values()))
    before = net(x)
    fuse_convs(net, lambda: net(x))
    assert sorted(net.fused_rows) == [row for row in range(15) if row not in (4, 6)]
    for name, level in net(x).items():
        torch.testing.assert_close(level, before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fusion": "mean"}, "fusion must be two positive numbers, got 'mean'"),
        ({"fusion": (1.0,)}, "fusion must be two positive numbers, got (1.0,)"),
        ({"fusion": (1.0, 0)}, "fusion must be two positive numbers, got (1.0, 0)"),
        ({"alphas": (1.0, float("nan"))}, "alphas must be two positive numbers, got (1.0, nan)"),
        ({"alphas": 0.5}, "alphas must be two positive numbers, got 0.5"),
    ],
)
def test_what_is_refused(change, problem):
    with pytest.raises(ValueError, match=r"row 3 \(block 5\): ") as refusal:
        checked(changed(3, **change))
    assert problem in str(refusal.value)
    with pytest.raises(ValueError, match="the links of the mobile family have no alphas"):
        checked(changed(3, MOBILE_SPINENET, alphas=(0.5, 0.5)), MOBILE_KINDS)


def test_both_are_dimensions_of_a_space():
    space = Space(PAPER.levels, PAPER.shifts, window=5, fusions=(None, "learned", (0.5, 1.0)), alphas=(0.25, 0.5, 1.0))
    assert space.count == PAPER.count * 3**15 * 9**15
    rng = random.Random(0)
    for _ in range(100):
        rows = space.decode(space.sample(rng))
        assert checked(as_rows(rows)) == rows
        assert space.decode(space.encode(rows)) == rows
    turned = changed(7, rows, parents=rows[7].parents[::-1], fusion=(1.0, 0.5), alphas=(0.25, 1.0))
    back = space.decode(space.encode(turned))[7]
    assert (back.parents, back.fusion, back.alphas) == (rows[7].parents, (0.5, 1.0), (1.0, 0.25))
    with pytest.raises(ValueError, match="row 0: the space has no link of alpha None"):
        space.encode(SPINENET)
    with pytest.raises(ValueError, match="row 2: the space has no fusion learned"):
        PAPER.encode(changed(2, fusion="learned"))

"""The last convs where a detection can be: exact there, and no cell above the threshold is missed."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from retina_fast.deploy.eight_bits.last_conv import Codes, LastConv
from retina_fast.deploy.eight_bits.sieve import Sieve
from retina_fast.kernels.candidate_selection import logit
from tests.deploy.eight_bits.everywhere import same_as_everywhere

INPUTS = (Codes(0.02, 0), Codes(0.015, 40))


def last_conv(outputs, kernel=(3, 3), levels=1):
    weight = torch.randn(outputs, 5, *kernel).contiguous(memory_format=torch.channels_last)
    return LastConv(weight, torch.randn(outputs), INPUTS[:levels])


def features_of(batch, height, width, border=2):
    """(batch, height + border, width + border, 5) uint8."""
    return torch.randint(0, 256, (batch, height + border, width + border, 5), dtype=torch.uint8)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 5), (2, 4)])
def test_a_conv_at_some_cells_and_at_all(kernel, batch, monkeypatch):
    """Of two levels, 6x9 and 4x7 cells, of which the second has another code for 0."""
    conv = last_conv(7, kernel, levels=2)
    features = [features_of(batch, h + kernel[0], w + kernel[1], border=0) for h, w in ((5, 8), (3, 6))]
    given, exact = [level.clone() for level in features], []
    for level, (held, codes) in enumerate(zip(INPUTS, features, strict=True)):
        values = (held.scale * (codes.double() - held.zero)).permute(0, 3, 1, 2)
        exact.append(F.conv2d(values, conv.weight.double(), conv.bias.double()).permute(0, 2, 3, 1))
        torch.testing.assert_close(conv.everywhere(codes, level).double(), exact[-1], rtol=1e-5, atol=1e-5)
    right = torch.cat([level.flatten(0, 2) for level in exact])
    assert len(right) == batch * (54 + 28)
    some = (torch.rand(len(right)) < 0.5).nonzero()[:, 0]
    for cells in (torch.arange(len(right)), some, some[some < 54], some[some >= 54 * batch], some[:0]):
        for part in (4096, 10):
            monkeypatch.setattr("retina_fast.deploy.eight_bits.last_conv.CELLS", part)
            torch.testing.assert_close(conv.at(features, cells).double(), right[cells], rtol=1e-5, atol=1e-5)
            row, output = (torch.rand(len(cells), 7) < 0.2).nonzero(as_tuple=True)
            made = conv.some_at(features, cells, row, output)
            torch.testing.assert_close(made.double(), right[cells][row, output], rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, features, given))


@pytest.fixture
def computed(monkeypatch):
    """What the convs computed: which conv, the cells, and how many outputs of them all."""
    made: list[tuple[LastConv, list[int], int]] = []
    at, some_at, everywhere = LastConv.at, LastConv.some_at, LastConv.everywhere

    def multiplied(conv, features, cells):
        made.append((conv, cells.tolist(), len(cells) * len(conv.bias)))
        return at(conv, features, cells)

    def chosen(conv, features, cells, rows, outputs):
        made.append((conv, cells.tolist(), len(outputs)))
        return some_at(conv, features, cells, rows, outputs)

    def dense(conv, features, level):
        outputs = everywhere(conv, features, level)
        made.append((conv, list(range(outputs[..., 0].numel())), outputs.numel()))
        return outputs

    for name, way in {"at": multiplied, "some_at": chosen, "everywhere": dense}.items():
        monkeypatch.setattr(LastConv, name, way)
    return made


def outputs_of(codes):
    """One level of codes (H, W) as a graph gives them: the second of three logits has the code, the others 0."""
    codes = torch.tensor(codes, dtype=torch.uint8)[None, :, :, None]
    return [F.pad(codes, (1, 1)), *(features_of(1, *codes.shape[1:3]) for _ in range(2))]


def test_cells_are_chosen_by_code_margin_and_threshold(computed):
    sieve = Sieve(last_conv(3), last_conv(12), (Codes(0.5, 10),), (1.0,), (0.0,))  # logit -5 has code 0, 0 has 10
    outputs = outputs_of([[0, 7, 8, 255], [3, 4, 9, 0]])

    rows = sieve.logits.everywhere(outputs[1], 0).flatten(0, 2)

    def check(threshold, chosen, sieve=sieve, all_computed=False):
        computed.clear()
        found = sieve.candidates(outputs, 1, threshold, 99)
        ((conv, cells, wanted),) = computed
        assert (conv, wanted) == (sieve.logits, 3 * len(cells))  # all logits of a cell
        assert cells == ([*range(8)] if all_computed else chosen)
        above = (rows > logit(threshold)) & torch.isin(torch.arange(8), torch.tensor(chosen))[:, None]
        expected = rows.masked_fill(~above, -math.inf).flatten().sort(descending=True, stable=True)
        count = int(above.sum())
        assert found.counts.tolist() == [count]
        assert found.anchors[0, :count].tolist() == expected.indices[:count].tolist()
        torch.testing.assert_close(found.scores[0, :count], expected.values[:count].sigmoid(), rtol=1e-4, atol=1e-5)
        assert (found.labels[0] == 0).sum() == count

    check(0.5, [2, 3, 6])  # logit 0, less the margin: -1, which has code 8
    check(0.5, [3], replace(sieve, margins=(0.0,)))
    check(torch.tensor(0.2).logit().neg().sigmoid().item(), [3])
    check(1.0, [3])  # 255 stands for any greater logit
    for threshold in (0.0, -1.0, 0.001):  # code 0 stands for any lower logit
        check(threshold, [*range(8)], all_computed=True)
    check(0.1, [*range(8)], all_computed=True)  # more than 40% of the cells


def of_exact(conv, features, level, held, margin, excess):
    """Codes that are as far off as margin and excess say, and saturate."""
    exact = conv.everywhere(features, level)
    off = exact - margin + held.scale + torch.rand(exact.shape) * (margin + excess - 2 * held.scale)
    return (off / held.scale + held.zero).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("classes", [2, 24])
@pytest.mark.parametrize("topk", [0, 1, 5, 40, 10**9])
def test_candidates_are_those_of_all_cells(classes, topk, computed, monkeypatch):
    """Of two levels and images, of which the second has lower logits; where an anchor has few classes, and many."""
    monkeypatch.setattr("retina_fast.deploy.eight_bits.last_conv.CELLS", 4)
    conv = last_conv(3 * classes, levels=2)
    features = [features_of(2, side, 9) for side in (15, 8)]
    for level in features:
        level[1] //= 2
    conv = replace(conv, bias=conv.bias - conv.everywhere(features[0], 0).quantile(0.95 if classes == 2 else 0.997))
    held, margins, excesses = (Codes(0.5, 128), Codes(0.4, 100)), (2.0, 1.0), (3.0, 1.5)
    codes = [of_exact(conv, features[i], i, held[i], margins[i], excesses[i]) for i in range(2)]
    sieve = Sieve(conv, last_conv(12, levels=2), held, margins, excesses)
    outputs = [*codes, *features, *(features_of(2, side, 9) for side in (15, 8))]
    found = same_as_everywhere(sieve, outputs, classes, 0.5, topk)
    assert found.counts[0] >= min(topk, 20)
    computed.clear()
    sieve.candidates(outputs, classes, 0.5, topk)
    count = sum(wanted for *_, wanted in computed)
    if topk <= 5:  # then fewer are computed than exceed the threshold
        computed.clear()
        sieve.candidates(outputs, classes, 0.5, 10**9)
        assert count < sum(wanted for *_, wanted in computed)
        assert count < (0.5 if classes == 2 else 0.02) * sum(level.numel() for level in codes)
    for score_thresh in (0.0, 0.02, 0.9, 1.0):
        same_as_everywhere(sieve, outputs, classes, score_thresh, topk)


@pytest.mark.parametrize(("share", "computed_of_100"), [(0.1, 10), (0.5, 100)])
def test_many_logits_of_a_cell_are_computed_one_by_one_or_all_together(share, computed_of_100, computed):
    conv, features = last_conv(100), features_of(1, 20, 20)
    codes = torch.zeros(1, 20, 20, 100, dtype=torch.uint8)
    codes[0, 3:6, :, : int(100 * share)] = 255
    sieve = Sieve(conv, last_conv(12), (Codes(0.1, 100),), (0.1,), (0.1,))
    found = sieve.candidates([codes, features, features], 50, 0.5, 10**9)
    ((_, cells, count),) = computed
    assert (cells, count) == (list(range(60, 120)), 60 * computed_of_100)
    exact = conv.everywhere(features, 0)[0, 3:6, :, :computed_of_100]
    right = exact[exact > 0].sort(descending=True).values.sigmoid()
    torch.testing.assert_close(found.scores[0, : int(found.counts)], right)


def test_of_each_image_those_are_computed_that_can_be_among_its_own_highest(computed):
    """An image with few logits above the threshold does not lower the bar for the others."""
    sieve = Sieve(last_conv(6), last_conv(12), (Codes(0.1, 100),), (0.1,), (0.1,))
    codes, features = torch.randint(0, 256, (2, 40, 40, 6), dtype=torch.uint8), features_of(2, 40, 40)
    codes[1] = 0
    codes[1, 7, 3:8] = 200
    sieve.candidates([codes, features, features], 2, 0.5, 9)
    sieve.candidates([codes[:1], features[:1], features[:1]], 2, 0.5, 9)
    (_, both, _), (_, alone, _) = computed
    assert both == [*alone, *range(1600 + 7 * 40 + 3, 1600 + 7 * 40 + 8)]
    assert len(alone) < 200  # of 1,600


def test_images_without_candidates_change_nothing_for_the_others():
    sieve = Sieve(last_conv(6), last_conv(12), (Codes(0.1, 100),), (0.1,), (0.1,))
    codes = torch.randint(0, 256, (1, 40, 40, 6), dtype=torch.uint8)
    features = features_of(1, 40, 40)
    alone = sieve.candidates([codes, features, features], 2, 0.5, 9)
    assert alone.counts.tolist() == [9]
    blank = torch.zeros_like(codes)
    for place, batch in enumerate(([codes, blank], [blank, codes, blank], [blank, blank, codes])):
        many = features.expand(len(batch), -1, -1, -1).contiguous()
        found = sieve.candidates([torch.cat(batch), many, many], 2, 0.5, 9)
        assert found.counts.tolist() == [9 * (image is codes) for image in batch]
        assert torch.equal(found.anchors[place], alone.anchors[0])
        torch.testing.assert_close(found.scores[place], alone.scores[0])
    none = sieve.candidates([codes[:0], features[:0], features[:0]], 2, 0.5, 9)
    assert none.anchors.shape == (0, 9)
    assert sieve.offsets([codes[:0], features[:0], features[:0]], none.anchors, 3).shape == (0, 9, 4)

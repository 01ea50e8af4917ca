"""The ways that NMS goes by the number of boxes and classes: walks, tiles dealt out by class, pairs on a CPU."""

from functools import partial

import pytest
import torch

from retina_fast.kernels import nms_deal, nms_tiles
from retina_fast.kernels.batched_nms import batched_nms_reference
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import call_batched_nms
from tests.kernels.test_batched_nms import by_kernels, equal

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels


@pytest.mark.parametrize("count", [8193, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_boxes(count, device, monkeypatch):
    """Longer rows than the kernels sort, as in 100,000 boxes an image, with equal scores, NaN, both zeros, and boxes
    that do not count; stops at what the result holds."""
    if device.type == "cpu":  # the interpreter's time is that of the programs
        few = {"_TILE": 1024, "_PART_OF_MANY": 1024, "_MANY": 0, "_PAIRS": 2**16, "_PROGRAMS": 1}
        for name, value in few.items():
            monkeypatch.setattr(nms_tiles, name, value)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, count, 2, generator=generator) * 250
    boxes = torch.cat((corner, corner + 20), dim=2).to(device)
    scores = torch.rand(1, count, generator=generator).mul(999).round()
    scores[0, 500:504] = torch.tensor([torch.nan, -0.0, 0.0, -torch.inf])
    scores, counts = scores.to(device), torch.tensor([count - 9], device=device)
    equal(
        by_kernels(boxes, scores, None, counts, 0.5, 100), batched_nms_reference(boxes, scores, None, counts, 0.5, 100)
    )


@pytest.mark.parametrize(
    ("by_class", "count", "most", "launches", "kernel"),
    [
        (True, 5000, 300, 4, "_suppress_kernel"),
        (True, 7000, 7000, 6, "_tiles_kernel"),
        (False, 80, 80, 4, "_suppress_kernel"),
        (False, 7000, 7000, 4, "_tiles_kernel"),
    ],
)
def test_many_boxes_or_one_class_go_tile_by_tile(by_class, count, most, launches, kernel):
    """Two launches order the scores, two deal out classes for the tiles, one decides and one writes what is kept."""
    made = [
        launch.kernel.__name__ for launch in launches_of(partial(call_batched_nms, by_class, False, 1, count, most))
    ]
    assert len(made) == launches
    assert kernel in made


@pytest.mark.parametrize("with_keys", [True, False])
def test_classes_are_dealt_out_in_order(with_keys, device, monkeypatch):
    """Against a stable sort by the low bits of the class; many tiles, negative classes, an image without boxes."""
    monkeypatch.setattr(nms_deal, "_TILE", 64)
    generator = torch.Generator().manual_seed(0)
    labels, counts = torch.randint(-9, 9, (3, 300), generator=generator), torch.tensor([300, 0, 130])
    best = torch.stack([torch.randperm(int(count), generator=generator) for count in (300, 300, 300)])
    best = torch.stack([torch.cat((row[row < n], row[row >= n])) for row, n in zip(best, counts, strict=True)])
    keys = (2**31 - 1 - best) if with_keys else None
    placed = labels.to(device), None if keys is None else keys.to(device), counts.to(device)
    found = [x.cpu() for x in nms_deal.deal(*placed, 4, 32)]
    for b, n in enumerate(counts.tolist()):
        order = best[b, :n] if with_keys else torch.arange(n)
        groups, ranks = (labels[b, order] & 3).sort(stable=True)
        assert torch.equal(found[1][b, :n], ranks.int())
        assert torch.equal(found[0][b, :n], order[ranks].int())
        assert found[2][b].tolist() == [int((groups < g).sum()) for g in range(5)]


@pytest.mark.parametrize(("batch", "groups"), [(0, 128), (1, 128), (4, 128), (5, 64), (8, 64), (32, 16), (600, 16)])
def test_classes_are_shared_out_to_as_many_programs_as_the_batch_leaves_room_for(batch, groups):
    (launch,) = [
        launch
        for launch in launches_of(partial(call_batched_nms, True, True, batch))
        if launch.kernel.__name__ == "_suppress_kernel"
    ]
    assert launch.kwargs["GROUPS"] == groups
    assert launch.grid == (groups, batch)

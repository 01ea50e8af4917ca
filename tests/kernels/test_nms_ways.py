"""The ways that NMS goes by the number of boxes and classes: walks, tiles dealt out by class, pairs on a CPU."""

from functools import partial

import pytest
import torch

from retina_fast.kernels import batched_nms as batched_nms_module
from retina_fast.kernels import nms_deal, nms_tiles
from retina_fast.kernels.batched_nms import batched_nms_reference
from tests.instruments.fake_gpu import launches_of
from tests.instruments.kernel_calls import call_batched_nms
from tests.kernels.test_batched_nms import by_kernels, chain, equal

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, of interpreted kernels


@pytest.mark.parametrize("count", [8193, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_boxes(count, device, monkeypatch):
    """Longer rows than the kernels sort, as in 100,000 boxes an image, with equal scores, NaN, both zeros, and boxes
    that do not count; stops at what the result holds."""
    most = count
    if device.type == "cpu":  # the interpreter's time is that of the programs
        most = 100
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
        by_kernels(boxes, scores, None, counts, 0.5, most),
        batched_nms_reference(boxes, scores, None, counts, 0.5, most),
    )


def pairs(count, generator):
    """Boxes (count, 4), the best first, of which each overlaps with one other: the better one of the two is kept."""
    place = torch.arange(count // 2).repeat(2)[torch.randperm(count, generator=generator)]
    better = torch.zeros(count, dtype=torch.bool)
    better[place.sort(stable=True).indices.view(-1, 2)[:, 0]] = True
    x, y = place % 1000 * 20.0 + 2.0 * ~better, place // 1000 * 20.0
    return torch.stack((x, y, x + 10, y + 10), dim=1), place, better.nonzero().flatten()


def chained(count, generator):
    """Boxes (count, 4) as those of `chain`, of which every other one is kept."""
    kept = torch.cat((torch.tensor([0]), torch.arange(1, count, 2)))
    return chain(count), torch.zeros(count, dtype=torch.int64), kept


@pytest.mark.parametrize("programs", [1, 256, 4096])
@pytest.mark.parametrize(
    ("count", "classes", "batch"), [(3000, 1, 1), (100_000, 1, 1), (100_000, 20, 1), (12_000, 1, 8)]
)
@pytest.mark.parametrize("scene", [pairs, chained])
def test_tiles_see_what_the_tiles_before_them_keep(scene, count, classes, batch, programs, device, monkeypatch):
    """On a GPU, call after call and replay after replay, beside other work, with poison in the memory of the last call:
    a tile that reads what another keeps before it is written gives another result. Else once, in few small tiles."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        if programs > 1 or count != 100_000:
            pytest.skip("interpreted programs run one after another")
        count = 300
        for name, value in (("_TILE", 64), ("_PART", 16), ("_PAIRS", 1024), ("_GROUPS", 4)):
            monkeypatch.setattr(nms_tiles, name, value)
        monkeypatch.setattr(nms_deal, "_TILE", 64)
        for name in ("_WALKED", "_WALKED_OF_ONE_CLASS"):
            monkeypatch.setattr(batched_nms_module, name, 0)
    monkeypatch.setattr(nms_tiles, "_PROGRAMS", programs)
    generator = torch.Generator().manual_seed(count)
    boxes, place, kept = scene(count, generator)
    order = torch.randperm(count, generator=generator)
    position = order.argsort()  # where a box lies in the call
    scores = torch.linspace(1, 0, count, dtype=torch.float64).float()
    rows = [x[order].expand(batch, *x.shape).contiguous().to(device) for x in (boxes, scores, place % classes)]
    labels = rows[2] if classes > 1 else None
    arguments = rows[0], rows[1], labels, torch.full((batch,), count, device=device), 0.5, count
    expected = torch.cat((position[kept], torch.zeros(count - len(kept), dtype=torch.int64))).to(device)

    def check(found):
        assert torch.equal(found.counts, torch.full_like(found.counts, len(kept)))
        assert torch.equal(found.positions, expected.expand(batch, -1))

    check(by_kernels(*arguments))
    if on_gpu:
        other = torch.rand(2**26, device=device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # empty memory becomes NaN and the largest integers
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = by_kernels(*arguments)
            beside = torch.cuda.Stream()
            for _ in range(20):
                with torch.cuda.stream(beside):
                    other.sin_()
                graph.replay()
                check(found)
                check(by_kernels(*arguments))
        finally:
            torch.use_deterministic_algorithms(False)


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

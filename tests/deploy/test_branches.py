"""Branches on side streams: results, and that nothing runs before what it reads, by streams that are not there."""

import dataclasses

import pytest
import torch

from retina_fast import (
    compile_inference,
    retinanet_resnet18_fpn,
    retinanet_resnet18_fpn_lite,
    retinanet_spinenet49s_mobile,
)
from retina_fast.deploy import engine
from retina_fast.deploy.branches import STREAMS, Branches
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.tuned import Chooser
from retina_fast.forward import run_convs
from tests.deploy.engine_soak import graphs_or_stand_ins, small_model
from tests.deploy.pictures import images
from tests.instruments.streams import FakeStream, RaceError, Streams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    plain = retinanet_resnet18_fpn(num_classes=3, weights=None, weights_backbone=None)
    return compile_inference(plain.cpu(), dtype=torch.float32).model


def run(model, count):
    """Trunk and heads of a batch on so many side streams, every level read in the end; and the streams."""
    sides = [FakeStream() for _ in range(count)]
    with torch.no_grad(), Streams() as streams:
        levels, heads = Branches(sides)(model, pixels())
        outputs = [*levels, *(level for levels in heads.values() for level in levels)]
        outputs = [output.clone() for output in outputs]
    return outputs, streams, sides


def pixels():
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 3, pytest.param(9, marks=pytest.mark.slow)])
def test_branches_give_what_one_stream_gives(model, count):
    with torch.no_grad():
        levels, heads = run_convs(model, pixels())
    outputs, streams, sides = run(model, count)
    for expected, output in zip([*levels, *heads["cls_logits"], *heads["bbox_regression"]], outputs, strict=True):
        assert torch.equal(output, expected)
    given = [streams.given[side] for side in sides]
    assert all(given), given


@pytest.mark.parametrize("build", [retinanet_resnet18_fpn_lite, retinanet_spinenet49s_mobile])
def test_other_pyramids_and_heads_give_what_one_stream_gives(build):
    """A pyramid whose extra level is of another kind, and heads whose levels have norms of their own."""
    own = compile_inference(build(num_classes=3, weights_backbone=None).cpu(), dtype=torch.float32).model
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        levels, heads = run_convs(own, x)
        with Streams() as streams:
            found_levels, found = Branches([FakeStream() for _ in range(STREAMS - 1)])(own, x)
            found_heads = {name: [output.clone() for output in found[name]] for name in found}
    assert len(streams.given) > 1
    for ours, expected in zip(found_levels, levels, strict=True):
        assert torch.equal(ours, expected)
    for name, outputs in heads.items():
        for ours, expected in zip(found_heads[name], outputs, strict=True):
            assert torch.equal(ours, expected)


# That the streams that are not there notice what is wrong


def start_early(self, work, stream):
    """Without waiting for what the branch reads."""
    with torch.cuda.stream(stream):
        result = work()

    def join():
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return (result, work)[0]

    return join


def join_early(self, work, stream):
    """Without waiting for what the branch writes."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = work()
    return lambda: (result, work)[0]


def forget(self, work, stream):
    """What the branch reads may be freed while it runs."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = work()

    def join():
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return result

    return join


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (start_early, "reads what another stream may not have written"),
        (join_early, "reads what another stream may not have written"),
        (forget, "may be given memory that another stream still reads"),
    ],
)
def test_a_branch_that_does_not_wait_is_noticed(model, start, message, monkeypatch):
    monkeypatch.setattr(Branches, "start", start)
    with pytest.raises(RaceError, match=message):
        run(model, 3)


def test_memory_of_a_branch_is_held_until_others_have_read_it():
    side, race = FakeStream(), pytest.raises(RaceError, match="may be given memory that another stream still reads")
    with Streams() as streams:
        with streams.entered(side):
            x = torch.ones(3)
        streams.stack[0].wait_stream(side)
        x + 1
        del x
        with streams.entered(side), race:  # which did not wait for the sum
            torch.ones(3)


# In the engine


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for a CPU")
@pytest.mark.parametrize("best", [1, STREAMS])
def test_the_engine_tries_streams_remembers_and_says(best, tmp_path, monkeypatch):
    offered = []

    def choose(self, layer, ways, definitions=None):
        if not layer.startswith("graph"):
            return next(iter(ways))
        offered.append((layer, {name: way() for name, way in ways.items()}))
        return f"{best} streams"

    monkeypatch.setattr(Chooser, "choose", choose)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: FakeStream())
    made = compile_inference(small_model().cpu(), dtype=torch.float32, choices=tmp_path / "choices.json")
    expected = made(images((30, 30)))
    assert not offered
    assert not made.report.streams
    with graphs_or_stand_ins(), Streams():
        own = Engine(made.model, dataclasses.replace(made.settings, graphs=True), made.report)
        torch.testing.assert_close(own(images((30, 30))), expected)
        ((layer, scores),) = offered
        assert [*scores] == ["1 streams", f"{STREAMS} streams"]
        assert all(torch.equal(found, scores["1 streams"]) for found in scores.values())
        assert "1x3x32x32 torch.float32" in layer
        own(images((20, 30)))  # the same shape: nothing is tried again
        monkeypatch.setattr(engine, "MOST_PIXELS", 2000)
        torch.testing.assert_close(own(images((60, 30))), made(images((60, 30))))  # too large
        assert len(offered) == 1
    assert own.report.streams == {(1, 3, 32, 32): best}
    assert f"{best} CUDA stream{'s' * (best > 1)} at 1x3x32x32" in str(own)
    assert not own.double().report.streams  # what was measured holds no longer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_with_branches_finds_what_one_without_finds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = retinanet_resnet18_fpn(num_classes=5, weights=None, weights_backbone=None, min_size=256, score_thresh=0.005)
    pictures = [image.cuda() for image in images((256, 300), (200, 310))]
    own = []
    for name in ("1 streams", f"{STREAMS} streams"):

        def choose(_, layer, ways, definitions=None, name=name):
            return name if layer.startswith("graph") else next(iter(ways))

        monkeypatch.setattr(Chooser, "choose", choose)
        own.append(compile_inference(model.cuda().eval(), choices=tmp_path / name))
    for _ in range(3):
        one, several = (either.detect(pictures) for either in own)
        assert one.counts.sum() > 0
        torch.testing.assert_close(tuple(several), tuple(one), rtol=0, atol=1e-3)

"""The engine's plans: one for each batch shape, bounded in number, each a graph or not, compiled or not."""

import dataclasses
import gc

import pytest
import torch

from retina_fast import compile_inference, retinanet_resnet18_fpn_v2
from retina_fast.deploy import engine
from retina_fast.deploy import plan as plans
from retina_fast.deploy.engine import Engine
from retina_fast.deploy.plan import Plan
from retina_fast.forward import run_convs
from tests.deploy.engine_soak import graphs_or_stand_ins, small_model, soak
from tests.deploy.pictures import floats, images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def with_graphs():
    """An engine that captures graphs, on a CPU stand-ins of them."""
    with graphs_or_stand_ins():
        made = compile_inference(small_model(), dtype=torch.float32, max_shapes=3)
        yield Engine(made.model, dataclasses.replace(made.settings, graphs=True), made.report)


def shapes(own):
    return [key[-3:-1] for key in own.shapes()]


def test_the_shape_used_longest_ago_goes(with_graphs):
    for size in ((30, 30), (60, 30), (30, 60), (30, 30), (90, 90)):
        with_graphs(images(size))
    assert shapes(with_graphs) == [(32, 64), (32, 32), (96, 96)]
    plan = with_graphs._plans[next(iter(with_graphs._plans))]
    with_graphs(images((20, 50)))  # another size, the same shape: nothing is made anew
    assert with_graphs._plans[list(with_graphs._plans)[-1]] is plan


def test_shapes_that_went_are_freed(with_graphs):
    gc.collect()
    before = sum(type(thing) is Plan for thing in gc.get_objects())
    for n in range(1, 8):
        with_graphs(images((30, 32 * n)))
    gc.collect()
    assert sum(type(thing) is Plan for thing in gc.get_objects()) - before == 3


def test_a_capture_that_fails_keeps_nothing_half_made(with_graphs, monkeypatch):
    def fail(run, place):
        raise torch.OutOfMemoryError

    with_graphs(images((30, 30)))
    with monkeypatch.context() as patch:
        patch.setattr(plans, "captured", fail)
        with pytest.raises(torch.OutOfMemoryError):
            with_graphs(images((90, 90)))
    assert shapes(with_graphs) == [(32, 32)]
    assert len(with_graphs(images((90, 90)))[0]["boxes"])


@pytest.mark.slow
def test_random_batches_give_right_results_in_bounded_memory():
    seen = soak(14, max_shapes=4)
    assert seen["shapes"] > 8
    assert seen["captures"] >= seen["shapes"]
    assert seen["detections"] > 12


def test_the_graph_reads_images_by_the_kernel(with_graphs, monkeypatch, device):
    """The kernel itself in place of its stand-in."""
    from retina_fast.kernels import image_batch

    monkeypatch.setattr(plans, "launch_image_batch", image_batch.launch_image_batch)
    monkeypatch.setattr(image_batch, "_ROWS", 32)
    for batch in (images((20, 30), (32, 17)), images((9, 32), (30, 30))):
        expected = with_graphs.model(floats([image.to(device) for image in batch]))
        for found, image in zip(with_graphs(batch), expected, strict=True):
            torch.testing.assert_close(found["boxes"], image["boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("graphs", [False, True])
def test_calls_in_and_out_of_inference_mode(graphs, with_graphs):
    own = with_graphs if graphs else compile_inference(small_model(), dtype=torch.float32)
    with torch.inference_mode():
        (inside,) = own([image.clone() for image in images((30, 30))])
    (outside,) = own(images((30, 30)))
    torch.testing.assert_close(inside, outside)
    outside["boxes"].add_(1)  # plain tensors
    assert not outside["boxes"].is_inference()


def test_made_in_inference_mode():
    model = small_model()
    with torch.inference_mode():
        own = compile_inference(model, images((30, 30)), dtype=torch.float32)
    assert own.report.difference is not None
    expected = compile_inference(model, dtype=torch.float32)(images((30, 30)))
    torch.testing.assert_close(own(images((30, 30))), expected, rtol=0, atol=1e-3)


def test_no_shape_kept():
    own = compile_inference(small_model(), dtype=torch.float32, max_shapes=0)
    own(images((30, 30)))
    assert not own.shapes()
    assert not own.settings.graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_equals_eager(dtype):
    torch.manual_seed(0)
    for model in (small_model(), retinanet_resnet18_fpn_v2(num_classes=5, min_size=256, score_thresh=0.005).cuda()):
        graphs = compile_inference(model, dtype=dtype)
        eager = compile_inference(model, dtype=dtype, max_shapes=0)
        assert graphs.settings.graphs
        for size in ((100, 120), (110, 115), (60, 90), (100, 120)):
            batch = [image.cuda() for image in images(size, size)]
            with engine.timed_convs():  # as capture does
                expected = eager.detect(batch)
            assert expected.counts.sum() > 0
            torch.testing.assert_close(tuple(graphs.detect(batch)), tuple(expected), rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_detect_waits_for_nothing():
    own = compile_inference(small_model())
    batch = [image.cuda() for image in images((100, 120), (60, 90))]
    own.detect(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        own.detect(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch.compile


def test_torch_compile_is_kept_where_it_is_faster(monkeypatch):
    """Which of the two is chosen and said; compiling itself is tested where there is a compiler."""
    calls = []

    def slower(model, batch):
        calls.append("compiled")
        return run_convs(model, batch)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: slower)
    monkeypatch.setattr(engine, "HAS_TRITON", False)  # no graphs, whose replay calls nothing
    for faster in ("eager", "compiled"):
        monkeypatch.setattr(
            engine, "seconds_of", lambda plan, *_, f=faster: 1.0 if (plan.convs is slower) == (f == "compiled") else 2.0
        )
        own = compile_inference(small_model(), dtype=torch.float32, try_compile=True)
        own(images((30, 30)))
        calls.clear()
        own(images((30, 30)))
        assert bool(calls) == (faster == "compiled")
        assert ("not kept" in str(own)) == (faster == "eager")
        assert "1x3x32x32" in str(own)


def test_where_torch_compile_fails_the_engine_runs_eagerly_and_says_so(monkeypatch):
    def broken(model, batch):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    own = compile_inference(small_model(), dtype=torch.float32, try_compile=True)
    with pytest.warns(UserWarning, match=r"torch.compile failed at \(1, 3, 32, 32\).*Failed to find C compiler"):
        (found,) = own(images((30, 30)))
    (expected,) = compile_inference(small_model(), dtype=torch.float32)(images((30, 30)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert "torch.compile at 1x3x32x32: failed, not kept (RuntimeError: Failed to find C compiler.)" in str(own)
    own(images((30, 30)))  # without another attempt

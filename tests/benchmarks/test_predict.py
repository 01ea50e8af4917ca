"""The model of an H200 gives the times that were worked out by hand, and more work takes longer."""

import dataclasses
import functools
import json

import pytest
import torch

from benchmarks.gpu.goals import GOALS
from benchmarks.gpu.report import PREDICTIONS, newest_version
from benchmarks.models import loss_path
from benchmarks.predict import float8, goals, hardware, options, predictions, roofline, sweep, work
from benchmarks.predict.roofline import bounds
from benchmarks.predict.work import Scene, Work
from benchmarks.static.compiled import Row, report
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import Launch, TorchOp, gpu_work_of, launches_of
from tests.ptx.counts import count

triton = pytest.importorskip("triton")
ROW = Row("", "", "sm_90", registers=48, shared=16, warps=4, path=1600, path_mufu=129)


@pytest.mark.parametrize(
    ("dtype", "floor", "path"),
    [(torch.bfloat16, 10.2, (1600, 129)), pytest.param(torch.float32, 20.3, (800, 65), marks=pytest.mark.slow)],
)
def test_focal_loss_is_bound_by_memory_at_the_floor_of_10_us_an_image(dtype, floor, path):
    """A copy takes 10.2 us to read and write 120,087 x 91 logits in bfloat16, and 20.3 us in float32."""
    launch, _ = launches_of(lambda: kernel_calls.call_focal_loss(dtype))
    row = Row("", "_focal_loss_kernel", "sm_90", registers=48, warps=4, path=path[0], path_mufu=path[1])  # 16 KB a tile
    step = roofline.kernel_step(launch, row, Scene())
    assert step.bound == "memory"
    assert 1e6 * (step.seconds - hardware.START) / 8 == pytest.approx(floor, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "all", "chain"])
def test_instructions_of_suppression_are_those_executed(kind):
    """The counts are of PTX on the emulator, the model's of machine code."""
    case, boxes = "batched_nms class-agnostic, all kept", 1024
    rows = predictions.by_variant(report(["sm_90"], [case], 1, {"_tiles_kernel"}))
    kept = {"none": boxes, "all": 1, "chain": boxes // 2}[kind]
    scene = Scene(candidates=boxes, members=boxes, kept=kept, rounds=sweep.rounds_of(boxes, kind))
    call = functools.partial(kernel_calls.call_batched_nms, False, False, 1, boxes, boxes)
    (launch,) = [launch for launch in launches_of(call) if launch.kernel.__name__ == "_tiles_kernel"]
    (row,) = [row for row in rows.values() if row.kernel == "_tiles_kernel"]
    (executed,) = [result for result, _ in count(f"batched_nms a box, {kind}{' overlapping' * (kind != 'chain')}")
                   if result.name == "_tiles_kernel"]  # fmt: skip
    predicted = row.warps * roofline.MODELS["_tiles_kernel"](launch, row, scene).instructions
    assert predicted == pytest.approx(executed.warp_instructions, rel=0.25)


def test_each_limit_by_hand():
    """1320 programs of 4 warps: ten an SM, as many as 48 registers a thread let it hold."""
    work = Work(bytes=4.32e9, instructions=1320 * 1000, mufu=1320 * 250, longest=19_800)
    found = bounds(work, ROW, programs=1320)
    clock = 67e12 / (2 * 128 * 132)
    assert found["memory"] == pytest.approx(1e-3)
    assert found["issue"] == pytest.approx(10 * 1000 / clock)  # four warps a program on four schedulers
    assert found["MUFU"] == pytest.approx(10 * 4 * 250 * 2 / clock)  # 16 results a cycle: a warp takes two
    assert found["dependent chain"] == pytest.approx(19_800 / clock)
    assert bounds(work, ROW, programs=1321)["dependent chain"] == pytest.approx(2 * 19_800 / clock)
    one_more = Work(work.bytes, 1321 * 1000)
    assert bounds(one_more, ROW, programs=1321)["issue"] == pytest.approx(11 * 1000 / clock)  # one SM has one more


def test_a_conv_goes_in_waves_of_tiles():
    """132 tiles of 128x128 fill the SMs; a conv of half as much arithmetic in as many rows takes no less."""
    full = TorchOp("convolution", 1, 2 * 132 * 128 * 128 * 2304, (1, 128, 132, 128))
    assert roofline.torch_step(full).seconds - hardware.START == pytest.approx(full.flop / (0.7 * hardware.MATMUL))
    tiny = TorchOp("convolution", 1, 2 * 49 * 256 * 2304, (1, 256, 7, 7))
    of_one_tile = 2 * 64 * 64 * 2304 * 132 / (0.5 * hardware.MATMUL)
    assert roofline.torch_step(tiny).seconds - hardware.START == pytest.approx(of_one_tile)


def test_the_fullest_run_of_logits():
    assert work._fullest(100, 8, 0.0) == 0
    assert work._fullest(100, 8, 1.0) == 8
    torch.manual_seed(0)
    drawn = (torch.rand(2000, 512, 8) < 0.01).sum(2).amax(1).float().mean()
    assert work._fullest(512, 8, 0.01) == pytest.approx(float(drawn), rel=0.03)


@functools.cache
def every_launch() -> list[Launch]:
    return [launch for call in kernel_calls.KERNEL_CALLS.values() for launch in launches_of(call.run)]


@pytest.mark.parametrize(
    ("kernel", "scene", "more"),
    [
        ("_anchor_matching_kernel", Scene(met=4, most_met=16, ground_truths=16), {"met": 8.0}),
        ("_match_kernel", Scene(ground_truths=16), {"ground_truths": 500}),
        ("_list_kernel", Scene(survivors=0.01), {"survivors": 0.02}),
        ("_search_kernel", Scene(survivors=0.01), {"survivors": 0.1}),
        ("_sort_runs_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_sort_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_place_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_box_decode_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_suppress_kernel", Scene(candidates=2000, members=200, kept=50), {"kept": 150}),
        ("_deal_kernel", Scene(candidates=1000), {"candidates": 2000}),
        ("_tiles_kernel", Scene(candidates=7000, members=500, kept=50), {"candidates": 14_000, "members": 1000}),
        ("_first_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_write_kept_kernel", Scene(candidates=2000), {"candidates": 4000}),
        ("_box_loss_kernel", Scene(foreground=0.1), {"foreground": 0.5}),
        ("_distribution_loss_kernel", Scene(foreground=0.1), {"foreground": 0.5}),
        ("_nearest_kernel", Scene(ground_truths=16), {"ground_truths": 500}),
        ("_offer_kernel", Scene(ground_truths=16), {"ground_truths": 500}),
        ("_predict_kernel", Scene(ground_truths=16, decoded=0.2), {"ground_truths": 500, "decoded": 1.0}),
        (
            "_align_kernel",
            Scene(ground_truths=16, near=20, most_near=100, inside=2000),
            {"most_near": 400, "inside": 4000},
        ),
        ("_image_batch_kernel", Scene(image_bytes=10), {"image_bytes": 10**9}),
    ],
)
def test_more_work_takes_longer(kernel, scene, more):
    first = next(launch for launch in every_launch() if launch.kernel.__name__ == kernel)
    row = Row(
        "", kernel, "sm_90", registers=48, warps=4, path=300, code=900, loops=[40, 120, 20, 30, 50, 60],
        through=[340, 420, 320, 330, 600],
    )  # fmt: skip
    row.loops_mufu = [0, 4, 0, 0, 0, 0]
    loops = {"_anchor_matching_kernel": 2, "_tiles_kernel": 6} | dict.fromkeys(
        ("_list_kernel", "_align_kernel", "_nearest_kernel"), 4
    )
    row.loops = row.loops[: loops.get(kernel, 3)]
    grown = Scene(**(vars(scene) | more))
    before, after = (roofline.MODELS[kernel](first, row, each) for each in (scene, grown))
    assert (after.bytes, after.instructions, after.longest) > (before.bytes, before.instructions, before.longest)
    assert max(bounds(after, row, 1000).values()) >= max(bounds(before, row, 1000).values())


def test_every_kernel_of_a_goal_is_modelled():
    """Kernels that no goal names, as the norm's and the dense focal loss's, have no model."""
    for call, _ in goals.CALLS.values():
        names = {launch.kernel.__name__ for launch in launches_of(call)}
        assert names
        assert names <= set(roofline.MODELS)


def test_every_option_of_the_loss_path_is_modelled_and_takes_the_memory_of_its_gradients():
    """A record has 412 MB of the first, logits and deltas of 365 MB."""
    for option in loss_path.OPTIONS:
        setting, inputs = dataclasses.replace(loss_path.GOAL, **option), list[torch.Tensor]()
        launches = launches_of(functools.partial(options.call_of, setting, inputs))
        assert {launch.kernel.__name__ for launch in launches} <= set(roofline.MODELS)
        least = sum(x.nbytes for x in inputs if x.dtype == torch.bfloat16)
        assert least < options.bytes_of(launches, inputs) < 1.2 * least


def test_the_scene_of_task_aligned_matching():
    """One ground truth: its tiles are the most that any has, and hold all anchors inside."""
    scene = options.scene_of(dataclasses.replace(loss_path.GOAL, batch=1, ground_truths=1))
    assert 1 <= scene.near == scene.most_near
    assert 0 < scene.inside < 128 * scene.near
    assert 0 < scene.decoded < 1


def test_every_goal_of_speed_has_a_prediction():
    stored = json.loads(PREDICTIONS.read_text())
    assert set(stored) == {"3.6.0", "3.8.0", "3.9.0"}
    for predicted in stored.values():
        assert set(predicted) == set(GOALS) - {"E3-mlperf", "E4"}  # the last is no speed
    for goal in (goal for predicted in stored.values() for goal in predicted.values()):
        assert 0 < goal["graph_ms"] < goal["ms"]
        assert sum(us for *_, us in goal["launches"]) / 1e3 < goal["graph_ms"]
    assert predictions.as_json(stored) == PREDICTIONS.read_text()


def test_the_notes_show_the_predictions():
    stored = json.loads(PREDICTIONS.read_text())
    assert "\n".join(predictions.table(stored[newest_version(stored)])) in predictions.NOTES.read_text()


@pytest.mark.slow
def test_predictions_follow_from_the_code():
    """predictions.json is what `python -m benchmarks.predict` writes for this Triton."""
    stored = json.loads(PREDICTIONS.read_text())
    if triton.__version__ not in stored:
        pytest.skip(f"predicted for Triton {' and '.join(stored)}")
    for name, goal in predictions.predictions(predictions.by_variant(report(["sm_90"]))).items():
        expected = stored[triton.__version__][name]["ms"]
        assert goal["ms"] == pytest.approx(expected, rel=0.05), f"{name}: run benchmarks.predict again"


def test_fp8_pays_for_its_passes_only_with_many_channels():
    """A product of few channels is bound by memory, of which FP8 with its passes moves more."""
    few, many = (float8.Product(20_000, (channels,), 1024) for channels in (64, 2048))
    assert few.in_float8() > few.in_bfloat16()
    assert many.in_float8() < many.in_bfloat16()
    followed = dataclasses.replace(many, followed=True)
    assert many.in_float8() + 4 * many.pixels * many.outputs / hardware.BANDWIDTH < followed.in_float8()
    both = dataclasses.replace(followed, channels=(2048, 64))
    assert both.in_bfloat16() < many.in_bfloat16() + few.in_bfloat16()
    assert both.in_float8() > many.in_float8() + few.in_float8()
    for product in (few, many, followed, both):
        least, rounding = product.as_one_kernel(1), product.as_one_kernel(2)
        assert least <= rounding < min(product.in_bfloat16(), product.in_float8())


@pytest.mark.slow
def test_the_notes_show_what_fp8_may_save():
    assert sum(len(product.channels) * n for product, n in float8.products_of(1).items()) == 16 * 2 + 4 + 3
    assert "\n".join(float8.table()) in predictions.NOTES.read_text()


def test_scenes_are_those_of_the_benchmarks():
    scene = goals.matching_scene(16, 16)
    assert scene.ground_truths == 16
    assert 1 < scene.met < scene.most_met <= 16
    assert 0.05 < scene.foreground < 0.5
    assert goals.nms_scene(32).candidates == 5000
    assert goals.nms_scene(32).walked == goals.nms_scene(1).walked == 512  # of which 300 are kept
    assert 512 / 16 < goals.nms_scene(32).members < 64
    assert 512 / 91 < goals.nms_scene(1).members < goals.nms_scene(32).members
    found = goals.postprocess_scene(1)
    assert found.survivors == 0.01
    assert 4000 < found.candidates <= 5000  # a thousand of each level, and fewer of the smallest


@pytest.mark.slow
def test_the_trunk_is_counted_as_it_runs():
    steps = goals.inference_work(1)
    convs = [step for step in steps if isinstance(step, TorchOp) and step.name == "convolution"]
    epilogues = [step for step in steps if isinstance(step, Launch) and step.kernel.__name__ == "_conv_epilogue_kernel"]
    stem = 2 * 147 * 64 * 400**2 / 1e9  # which a kernel of ours computes
    assert sum(conv.flop for conv in convs) / 1e9 + stem == pytest.approx(303, rel=0.01)
    assert len(convs) == 52 + 8 + 50  # ResNet, pyramid, two heads of five convs on five levels
    assert len(epilogues) == len(convs) - 4  # whose bias the block's last conv has taken over
    forward = goals.training_forward_work(2)
    flop = sum(step.flop for step in forward if isinstance(step, TorchOp))
    assert flop / 2e9 + stem == pytest.approx(303, rel=0.01)
    ready = [step for step in forward if isinstance(step, TorchOp) and step.name in ("mul", "copy_")]
    assert len(ready) > 50  # autocast is on: weights are cast


def test_what_torch_launches_is_seen_within_ops():
    def run():
        x = torch.empty(1000, 1000, device="cuda")
        y = (x + 1).view(-1)
        y.add_(1)
        torch.empty_like(y)
        return y[:10].float()

    steps = gpu_work_of(run)
    seen = [(step.name, step.bytes) for step in steps if isinstance(step, TorchOp)]
    assert seen == [("add", 8_000_000), ("add_", 8_000_000)]
    with pytest.raises(RuntimeError, match="makes the host wait"):
        gpu_work_of(lambda: torch.zeros(3).to("cuda"))


def test_the_table():
    launched = [["a", "memory", 1, 900.0], ["b", "launch", 9, 100.0]]
    predicted = {"K6": {"ms": 2.0, "graph_ms": 1.9, "launches": launched}}
    assert list(predictions.table(predicted))[-1] == "| K6 | 2.0 | 1.9 | 10 | a 90% (memory), b 10% (launch) |"

"""What each goal will take on an H200, predicted before it was measured: ``python -m benchmarks.predict``.

Writes benchmarks/predictions.json and the table of benchmarks/NOTES.md: of each goal of one GPU, every launch with its
time and what bounds it (benchmarks.predict.roofline), from the launches themselves, recorded on fake tensors, and
their machine code for sm_90 by the Triton at hand. ``make report`` draws them beside what is measured. Predictions are
of this project's own side; ratios follow from a record.
"""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from benchmarks.gpu import report
from benchmarks.gpu.report import write_between
from benchmarks.kernels import batched_nms
from benchmarks.models import postprocess, scenes, training_step
from benchmarks.predict import roofline
from benchmarks.predict.cost import Training
from benchmarks.predict.roofline import Scene, Step
from benchmarks.static import launches
from benchmarks.static import machine_code as static
from benchmarks.static.machine_code import Row
from benchmarks.static.recorder import Launch, TorchOp, record, timeline
from retina_fast import compile_inference, retinanet_resnet50_fpn
from retina_fast.deploy.engine import EngineSettings, Plan
from retina_fast.forward import DELTAS, LOGITS, HeadOutputs, run_convs
from retina_fast.kernels import anchor_matching as matching
from retina_fast.kernels.batched_nms import _GROUPS, nms_image
from retina_fast.kernels.box_decode import box_decode_reference
from retina_fast.kernels.candidate_selection import candidate_selection_reference
from retina_fast.kernels.one_pass import scale_op
from retina_fast.losses import detection_losses
from retina_fast.targets import GroundTruths

PREDICTIONS = Path(__file__).with_name("predictions.json")
NOTES = Path(__file__).parents[1] / "NOTES.md"
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"
BF16 = torch.bfloat16


# Scenes: what the data of the benchmarks decide, from those data.


@functools.cache
def matching_scene(batch: int, count: int) -> Scene:
    """Of the first image: how many ground truths each tile of anchors meets, and which tiles hold foreground."""
    anchors = scenes.anchors(800, 800, torch.device("cpu"))
    truths = scenes.scene(batch, count, 800, 800, 91, torch.device("cpu")).truths
    boxes, tiles = truths.boxes[:count], anchors.split(matching._TILE)
    corners = torch.stack([torch.cat((tile[:, :2].amin(0), tile[:, 2:].amax(0))) for tile in tiles])  # (T, 4)
    met = (boxes[None, :, :2] < corners[:, None, 2:]).all(2) & (boxes[None, :, 2:] > corners[:, None, :2]).all(2)
    offsets = torch.tensor([0, count])
    found = matching.anchor_matching_reference(anchors, boxes, truths.labels[:count], offsets).indices[0]
    foreground = sum(bool((tile >= 0).any()) for tile in found.split(256)) / len(found.split(256))
    met_by = met.sum(1)
    return Scene(float(met_by.float().mean()), int(met_by.max()), count, foreground)


def _kept(boxes: Tensor, scores: Tensor | None, labels: Tensor, survivors: float = 0.0) -> Scene:
    """Of NMS's fullest program: its boxes, and those it keeps."""
    groups = labels % _GROUPS
    kept = groups[nms_image(boxes, scores, labels, postprocess.IOU)]
    return Scene(
        survivors=survivors,
        candidates=len(boxes),
        members=int(groups.bincount().max()),
        kept=min(postprocess.KEPT, int(kept.bincount().max())),
    )


@functools.cache
def nms_scene() -> Scene:
    boxes, scores, labels, _ = batched_nms.inputs(batched_nms.BASES[0], torch.device("cpu"))
    return _kept(boxes[0], scores[0], labels[0])


@functools.cache
def postprocess_scene() -> Scene:
    setting = postprocess.Setting(batch=1)
    outputs, anchors, _ = postprocess.inputs(setting, torch.device("cpu"))
    found = candidate_selection_reference(outputs["cls_logits"], 91, postprocess.THRESHOLD, postprocess.TOPK)
    boxes = box_decode_reference(outputs["bbox_regression"], anchors, found.anchors, torch.tensor([[800, 800]]))
    count = int(found.counts[0])
    return _kept(boxes[0, :count], None, found.labels[0, :count], setting.above)


# Goals: the calls, on fake CUDA tensors.


def _focal_loss(dtype: torch.dtype) -> None:
    launches.call_focal_loss(dtype)
    torch.ones((), device="cuda")  # the incoming gradient
    launches.call_scale(dtype)


def _loss_path() -> None:
    batch = 16
    logits, deltas = launches.levels_of(BF16, 91, batch), launches.levels_of(BF16, 4, batch)
    anchors = torch.empty(120087, 4, device="cuda")
    truths = GroundTruths(*launches.ground_truths(16 * batch, batch), [16] * batch)
    outputs = HeadOutputs({LOGITS: logits, DELTAS: deltas}, anchors, 91, {})
    losses = detection_losses(outputs, truths, Matcher(0.5, 0.4, True), "l1")
    sum(loss.detach() for loss in losses.values())
    for levels, channels in ((logits, 91), (deltas, 4)):
        grads = [level.detach() for level in launches.flatten_all(levels, channels)]
        scale_op(grads, torch.ones((), device="cuda"))


@torch.no_grad()
def inference_steps(batch: int) -> list[Launch | TorchOp]:
    """The engine's graph of ResNet-50: images of 800x800 to detections."""
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    model = compile_inference(model, dtype=BF16).model

    def prepare() -> Any:
        _to_fake_gpu(model)
        settings = EngineSettings(BF16, graphs=False, max_shapes=1)
        plan = Plan(model, run_convs, (batch, 3, 800, 800), torch.uint8, settings)
        plan.run()  # makes the anchors
        return plan

    return timeline(lambda plan: plan.run(), prepare)


def training_forward(batch: int) -> list[Launch | TorchOp]:
    """Trunk and heads of the training step, from the batch to logits and deltas."""
    model = training_step.network(training_step.BASE)

    def prepare() -> Any:
        _to_fake_gpu(model)
        layout = torch.channels_last
        return torch.empty(batch, 3, 800, 800, device="cuda", memory_format=layout)

    def forward(images: Tensor) -> None:
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask for a GPU
        torch.set_autocast_dtype("cuda", BF16)
        try:
            run_convs(model, images)
        finally:
            torch.set_autocast_enabled("cuda", False)

    return timeline(forward, prepare)


def _to_fake_gpu(model: Any) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    layout = torch.channels_last if fake.dim() == 4 else torch.contiguous_format
                    tensors[name] = fake.contiguous(memory_format=layout).requires_grad_(value.requires_grad)
    cells = model.anchor_generator.cell_anchors
    model.anchor_generator.cell_anchors = [torch.empty(cell.shape, device="cuda") for cell in cells]


@dataclass(frozen=True)
class Goal:
    run: Callable[[], Any]
    scene: Callable[[], Scene] = Scene


GOALS = {
    "K1-fp32": Goal(lambda: _focal_loss(torch.float32)),
    "K1-bf16": Goal(lambda: _focal_loss(BF16)),
    "K2": Goal(_loss_path, lambda: matching_scene(16, 16)),
    "K3-g500": Goal(lambda: launches.call_anchor_matching(True, 4000, 8), lambda: matching_scene(8, 500)),
    "K3-b16": Goal(lambda: launches.call_anchor_matching(True, 256, 16), lambda: matching_scene(16, 16)),
    **{f"K4-b{b}": Goal(functools.partial(launches.detect, BF16, b), postprocess_scene) for b in (1, 8, 32)},
    **{f"K5-b{b}": Goal(functools.partial(launches.call_batched_nms, True, False, b), nms_scene) for b in (1, 32)},
    "K6": Goal(
        lambda: launches.call_image_batch(torch.float32, torch.float32),
        lambda: Scene(image_bytes=8 * 3 * 480 * 640 * 4),
    ),
}


def _steps(recorded: Iterable[Launch | TorchOp], rows: dict[tuple[str, ...], Row], scene: Scene) -> list[Step]:
    return [
        roofline.torch_step(step) if isinstance(step, TorchOp) else roofline.kernel_step(step, _row(step, rows), scene)
        for step in recorded
    ]


def _row(launch: Launch, rows: dict[tuple[str, ...], Row]) -> Row:
    """Of its own variant, or, where benchmarks.static.launches lacks it, of the same kernel and constants."""
    own = launch.variant
    alike = [row for variant, row in rows.items() if (variant[0], variant[-1]) == (own[0], own[-1])]
    return rows.get(own) or alike[0]


def compiled() -> dict[tuple[str, ...], Row]:
    """The sm_90 code of every launch of benchmarks.static.launches.CASES, by variant."""
    return by_variant(static.report(["sm_90"]))


def by_variant(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    found: dict[tuple[str, ...], Row] = {}
    of_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.target == "sm_90":
            of_case.setdefault(row.case, []).append(row)
    for case, case_rows in of_case.items():
        variants = {launch.variant: None for launch in record(launches.CASES[case].run)}
        found.update(zip(variants, case_rows, strict=True))
    return found


def predictions(rows: dict[tuple[str, ...], Row]) -> dict[str, dict[str, Any]]:
    """Of each goal: milliseconds of the call, as the host keeps the GPU busy, and of its graph; its launches."""
    steps = {name: _steps(timeline(goal.run), rows, goal.scene()) for name, goal in GOALS.items()}
    steps["E1"] = _steps(inference_steps(1), rows, postprocess_scene())
    steps["E2"] = _steps(inference_steps(32), rows, postprocess_scene())
    run = Training(width=800)
    forward = _steps(training_forward(16), rows, Scene())
    # backward of a part takes its forward's time as many times over as its convs take arithmetic; and the optimizer
    # reads and writes weights, gradients and momenta
    again = run.step_gflop / run.forward_gflop
    weights = sum(p.numel() for p in training_step.network(training_step.BASE).parameters() if p.requires_grad)
    steps["E3"] = [
        *[Step(step.name, again * step.seconds, step.bound) for step in forward],
        *steps["K2"],
        Step("optimizer", roofline.START + 5 * 4 * weights / roofline.BANDWIDTH, "memory"),
    ]
    return {name: _summary(of_goal) for name, of_goal in steps.items()}


def _summary(steps: list[Step]) -> dict[str, Any]:
    launched: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        launched.setdefault((step.name, step.bound), []).append(step.seconds)
    return {
        "ms": _rounded(1e3 * roofline.total(steps, graph=False)),
        "graph_ms": _rounded(1e3 * roofline.total(steps, graph=True)),
        "launches": [
            {"name": name, "bound": bound, "times": len(seconds), "us": _rounded(1e6 * sum(seconds))}
            for (name, bound), seconds in launched.items()
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def table(predicted: dict[str, Any]) -> Iterable[str]:
    """Rows of markdown."""
    yield "| goal | predicted, ms | as a graph | launches | most of it |"
    yield "|---|---|---|---|---|"
    for name, goal in predicted.items():
        whole = sum(launch["us"] for launch in goal["launches"])
        most = sorted(goal["launches"], key=lambda launch: -launch["us"])[:3]
        named = ", ".join(f"{launch['name']} {launch['us'] / whole:.0%} ({launch['bound']})" for launch in most)
        count = sum(launch["times"] for launch in goal["launches"])
        yield f"| {name} | {goal['ms']} | {goal['graph_ms']} | {count} | {named} |"


def main() -> None:
    import triton

    goals = predictions(compiled())
    stored = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {}
    PREDICTIONS.write_text(json.dumps(stored | {triton.__version__: goals}, indent=1) + "\n")
    write_between(NOTES, BEGIN, END, "\n" + "\n".join(table(report.predictions("newest"))) + "\n")
    print("\n".join(table(goals)))


if __name__ == "__main__":
    main()

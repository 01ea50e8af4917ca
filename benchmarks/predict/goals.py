"""What the GPU does for each goal: the calls on fake CUDA tensors, and scenes, which say what the data decide."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from benchmarks.kernels import batched_nms, postprocess
from benchmarks.models import scenes, training_step
from benchmarks.predict.work import Scene
from retina_fast import compile_inference, retinanet_resnet50_fpn
from retina_fast.backbones.fused_training import convs_fused
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.plan import EngineSettings, Plan
from retina_fast.forward import DELTAS, LOGITS, HeadOutputs, run_convs
from retina_fast.kernels.anchor_matching import anchor_matching_reference
from retina_fast.kernels.batched_nms import nms_image
from retina_fast.kernels.box_decode import box_decode_reference
from retina_fast.kernels.candidate_selection import candidate_selection_reference
from retina_fast.kernels.one_pass import scale_op
from retina_fast.losses import detection_losses
from retina_fast.targets import GroundTruths
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import Launch, TorchOp, gpu_work_of, launches_of

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def constant_of(call: str, kernel: str, name: str) -> int:
    """Returns a constant of a kernel as an entry of KERNEL_CALLS launches it, such as the length of its tile."""
    launches = launches_of(kernel_calls.KERNEL_CALLS[call].run)
    return next(launch.kwargs[name] for launch in launches if launch.kernel.__name__ == kernel)


@functools.cache
def matching_scene(batch: int, count: int) -> Scene:
    """Returns, of the first image, how many ground truths each tile of anchors meets and which hold foreground."""
    anchors = scenes.anchors(800, 800, CPU)
    truths = scenes.scene(batch, count, 800, 800, 91, CPU).truths
    boxes, tiles = (
        truths.boxes[:count],
        anchors.split(constant_of("anchor_matching", "_anchor_matching_kernel", "TILE")),
    )
    corners = torch.stack([torch.cat((tile[:, :2].amin(0), tile[:, 2:].amax(0))) for tile in tiles])  # (T, 4)
    met = (boxes[None, :, :2] < corners[:, None, 2:]).all(2) & (boxes[None, :, 2:] > corners[:, None, :2]).all(2)
    offsets = torch.tensor([0, count])
    found = anchor_matching_reference(anchors, boxes, truths.labels[:count], offsets).indices[0]
    foreground = sum(bool((tile >= 0).any()) for tile in found.split(256)) / len(found.split(256))
    runs = found.split(
        constant_of("focal_loss bf16", "_focal_loss_kernel", "TILE") // 91
    )  # anchors of a tile of logits
    mixed = sum(bool((run != -1).any()) for run in runs) / len(runs)
    met_by = met.sum(1)
    return Scene(float(met_by.float().mean()), int(met_by.max()), count, foreground, mixed)


def _kept(batch: int, boxes: Tensor, scores: Tensor | None, labels: Tensor, survivors: float = 0.0) -> Scene:
    """Returns, of the fullest program of NMS, its boxes and those that it keeps, as far as the programs walk."""
    constants = launches_of(functools.partial(kernel_calls.call_batched_nms, True, True, batch))[0].kwargs
    groups = labels % constants["GROUPS"]
    order = torch.arange(len(boxes)) if scores is None else scores.argsort(descending=True, stable=True)
    kept = nms_image(boxes, scores, labels, postprocess.IOU)[: postprocess.KEPT]
    last = int((order == kept[-1]).nonzero()) if len(kept) == postprocess.KEPT else len(boxes) - 1
    walked = order[: (last // constants["SCAN"] + 1) * constants["SCAN"]]
    return Scene(
        survivors=survivors,
        candidates=len(boxes),
        members=int(groups[walked].bincount().max()),
        kept=int(groups[kept].bincount().max()),
        walked=len(walked),
    )


@functools.cache
def nms_scene(batch: int) -> Scene:
    """Returns the scene of the NMS benchmark's first case, in a batch of so many images."""
    boxes, scores, labels, _ = batched_nms.inputs(batched_nms.BASES[0], CPU)
    return _kept(batch, boxes[0], scores[0], labels[0])


@functools.cache
def postprocess_scene(batch: int, above: float = 0.01) -> Scene:
    """Returns the scene of the postprocess benchmark's image, in a batch of so many; of its logits, the share `above`
    exceeds the threshold."""
    setting = postprocess.Setting(batch=1, above=above)
    outputs, anchors, _ = postprocess.inputs(setting, CPU)
    found = candidate_selection_reference(outputs["cls_logits"], 91, postprocess.THRESHOLD, postprocess.TOPK)
    boxes = box_decode_reference(outputs["bbox_regression"], anchors, found.anchors, torch.tensor([[800, 800]]))
    count = int(found.counts[0])
    return _kept(batch, boxes[0, :count], None, found.labels[0, :count], setting.above)


def _focal_loss(dtype: torch.dtype) -> None:
    kernel_calls.call_focal_loss(dtype)
    torch.ones((), device="cuda")  # the incoming gradient
    kernel_calls.call_scale(dtype)


def _loss_path() -> None:
    batch = 16
    logits, deltas = kernel_calls.levels_of(BF16, 91, batch), kernel_calls.levels_of(BF16, 4, batch)
    anchors = torch.empty(120087, 4, device="cuda")
    truths = GroundTruths(*kernel_calls.ground_truths(16 * batch, batch), [16] * batch)
    outputs = HeadOutputs({LOGITS: logits, DELTAS: deltas}, anchors, 91, {})
    losses = detection_losses(outputs, truths, Matcher(0.5, 0.4, True), "l1")
    sum(loss.detach() for loss in losses.values())
    for levels, channels in ((logits, 91), (deltas, 4)):
        grads = [level.detach() for level in kernel_calls.flatten_all(levels, channels)]
        scale_op(grads, torch.ones((), device="cuda"))


def _image_scene() -> Scene:
    return Scene(image_bytes=8 * 3 * 480 * 640 * 4)


# the goals of operations: a call, and its scene
CALLS: dict[str, tuple[Callable[[], Any], Callable[[], Scene]]] = {
    "K1-fp32": (lambda: _focal_loss(torch.float32), lambda: matching_scene(8, 16)),
    "K1-bf16": (lambda: _focal_loss(BF16), lambda: matching_scene(8, 16)),
    "K2": (_loss_path, lambda: matching_scene(16, 16)),
    "K3-g500": (lambda: kernel_calls.call_anchor_matching(True, 4000, 8), lambda: matching_scene(8, 500)),
    "K3-b16": (lambda: kernel_calls.call_anchor_matching(True, 256, 16), lambda: matching_scene(16, 16)),
    **{
        f"K4-b{b}": (functools.partial(kernel_calls.detect, BF16, b), functools.partial(postprocess_scene, b))
        for b in (1, 8, 32)
    },
    "K5-all": (
        lambda: kernel_calls.call_batched_nms(False, False, 1, 100_000, 100_000),
        lambda: Scene(candidates=100_000, members=100_000, kept=100_000),
    ),
    **{
        f"K5-b{b}": (functools.partial(kernel_calls.call_batched_nms, True, False, b), functools.partial(nms_scene, b))
        for b in (1, 32)
    },
    "K6": (lambda: kernel_calls.call_image_batch(torch.float32, torch.float32), _image_scene),
}


@torch.no_grad()
def inference_work(batch: int) -> list[Launch | TorchOp]:
    """Returns what the engine's graph of ResNet-50 does, from images of 800x800 to detections.

    Bias, sum and activation of each conv are taken to run by `conv_epilogue_`, the way that the engine found to be the
    fastest of 103 convs in 111 on an H200, and the stem by kernels of ours. cuDNN's own operation would save that pass.
    """
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    model = compile_inference(model, dtype=BF16).model

    def run_with_epilogue(conv: FusedConv, x: Tensor, z: Tensor | None, overwrite_z: bool = False) -> Tensor:
        return conv.run_with_epilogue(x, z)

    def prepare() -> Any:
        _to_fake_gpu(model)
        settings = EngineSettings(BF16, graphs=False, max_shapes=1)
        plan = Plan(model, run_convs, (batch, 3, 800, 800), torch.uint8, settings)
        plan.run()  # makes the anchors
        return plan

    def run(plan: Plan) -> None:
        kept = mock.patch("retina_fast.forward.batch_anchors", return_value=plan.anchors)  # as real anchors are
        with kept, mock.patch.object(FusedConv, "run_fused", run_with_epilogue):
            plan.run()

    return gpu_work_of(run, prepare)


def training_forward_work(batch: int) -> list[Launch | TorchOp]:
    """Returns what trunk and heads do in a training step, from the batch to logits and deltas."""
    model = training_step.network(training_step.BASE)

    def prepare() -> Any:
        _to_fake_gpu(model)
        layout = torch.channels_last
        return torch.empty(batch, 3, 800, 800, device="cuda", memory_format=layout)

    def forward(images: Tensor) -> None:
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask for a GPU
        torch.set_autocast_dtype("cuda", BF16)
        try:
            with convs_fused(model):
                run_convs(model, images)
        finally:
            torch.set_autocast_enabled("cuda", False)

    return [_as_conv(step) for step in gpu_work_of(forward, prepare)]


def _as_conv(step: Launch | TorchOp) -> Launch | TorchOp:
    """A pointwise conv by our kernel as one of cuDNN's that reads what is added, too: a product of matrices."""
    if not isinstance(step, Launch) or step.kernel.__name__ != "_conv_pointwise_kernel":
        return step
    tensors = [getattr(arg, "base", arg) for arg in step.args]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    flop = 2 * tensors[0].numel() * (step.kwargs["K"] + step.kwargs["K2"])
    pixels, channels = tensors[0].permute(0, 2, 3, 1).flatten(0, 2).shape if tensors[0].dim() == 4 else tensors[0].shape
    return TorchOp("convolution", size, flop, (1, channels, pixels, 1))


def _to_fake_gpu(model: Any) -> None:
    """Replaces the model's weights and anchors by fake CUDA tensors in channels_last memory."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    layout = torch.channels_last if fake.dim() == 4 else torch.contiguous_format
                    tensors[name] = fake.contiguous(memory_format=layout).requires_grad_(value.requires_grad)
    cells = model.anchor_generator.cell_anchors
    model.anchor_generator.cell_anchors = [torch.empty(cell.shape, device="cuda") for cell in cells]

"""What an engine did to its model, and how far its outputs are from the model's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retina_fast.deploy.eight_bits.agreement import Kept
from retina_fast.forward import DELTAS, LOGITS, Convs, run_convs, run_network
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.image_batch import image_batch
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.side_distributions import box_channels
from retina_fast.model import RetinaNet
from retina_fast.transform import channels_of, check_images, resized_sizes


@dataclass
class Difference:
    """How far the engine's outputs are from the model's own on some images, anchor by anchor."""

    images: int
    scores: float
    """The largest difference of a score, of any anchor and class."""
    boxes: float
    """The largest difference of a box coordinate, in pixels of the batch, where the score exceeds the threshold."""
    boxes_mean: float
    """The mean of those differences."""


@dataclass
class RuntimeChoice:
    """Which runtime runs trunk and heads, chosen by timing."""

    runtime: str
    size: tuple[int, ...]
    """Height and width of the image that was timed."""
    seconds: dict[str, float]
    """Of each runtime that ran."""
    failed: dict[str, str]
    """Of each that did not: why."""
    layers: int
    """How many layers compute in eight bits."""
    float32_layers: list[str]
    """The weights of those that do not, by ``float32_share``."""
    images: int
    """How many images were given, on which eight bits are calibrated."""
    margin: float | None = None
    """Where 8-bit logits decide what the last convs compute: the most that is added to them, of all levels, before they
    are compared with the score threshold."""
    kept: Kept | None = None
    """What became of the detections in the images, in eight bits."""

    def lines(self) -> list[str]:
        """What it says, for a person."""
        times = ", ".join(f"{name} {1000 * time:.1f} ms" for name, time in sorted(self.seconds.items()))
        height, width = self.size
        lines = [f"trunk and heads by {self.runtime}: at {height}x{width} {times}"]
        lines += [f"{name} was left out: {why}" for name, why in self.failed.items()]
        if self.layers:
            lines.append(
                f"{self.layers} layers in eight bits, {len(self.float32_layers)} left in float32, calibrated with "
                f"{self.images} images"
            )
        if self.margin is not None:
            lines.append(
                f"logits in float32 where those in eight bits, plus a margin of at most {self.margin:.2g}, exceed the "
                "threshold and can be among the highest"
            )
        if self.kept:
            lines.append(f"in eight bits: {self.kept}")
        return lines


@dataclass
class Float8:
    """Which convs may compute in FP8 (E4M3), and what that costs."""

    convs: int
    """How many 1x1 convs may. Each does at those shapes at which it is measured to be the faster way."""
    images: int
    """How many images were given, on which it is calibrated."""
    simulated: bool
    """Whether they all do, in float32 of rounded values."""
    kept: Kept
    """What became of the detections in the images, with all of these convs in FP8."""

    def lines(self) -> list[str]:
        """What it says, for a person."""
        how = "compute in FP8 (E4M3), simulated" if self.simulated else "may compute in FP8 (E4M3)"
        return [
            f"{self.convs} 1x1 convs {how}, calibrated with {self.images} images",
            f"with all of them in FP8: {self.kept}",
        ]


@dataclass
class Report:
    """What the engine did to the model, and what it cost."""

    device: str
    dtype: torch.dtype
    graphs: bool
    max_shapes: int
    norms: int
    """BatchNorms that the model had."""
    folded: int
    """How many of them were folded into convs."""
    convs: int
    fused: int
    """How many of the convs take what follows them, a sum or an activation, or have their weights packed."""
    difference: Difference | None = None
    runtime_choice: RuntimeChoice | None = None
    """Of an engine whose runtime was chosen by timing."""
    float8: Float8 | None = None
    """Of an engine whose 1x1 convs may compute in FP8."""
    ways: dict[tuple[int, ...], Mapping[str, int]] = field(default_factory=dict)
    """Of each batch shape at which the ways of the convs were timed: how many calls of convs run in which way;
    as ``tail``, how many ends of bottlenecks do, whose convs are counted as if they ran apart."""
    streams: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Of each batch shape at which that was timed: on how many CUDA streams its graph runs trunk and heads."""
    compiled: dict[tuple[int, ...], float] = field(default_factory=dict)
    """For each batch shape at which torch.compile was tried: its time divided by eager's. Below 1 it is kept."""
    not_compiled: dict[tuple[int, ...], str] = field(default_factory=dict)
    """Of each batch shape on which torch.compile failed: the error. The engine runs eagerly there."""

    def __str__(self) -> str:
        way = "one CUDA graph a batch shape" if self.graphs else "no CUDA graphs"
        lines = [
            f"RetinaNet engine on {self.device}: {str(self.dtype).removeprefix('torch.')}, channels_last",
            f"BatchNorm folded into convs: {self.folded} of {self.norms}",
            f"convs fused with what follows them: {self.fused} of {self.convs}",
            f"{way}; at most {self.max_shapes} batch shapes kept ready",
        ]
        lines += self.runtime_choice.lines() if self.runtime_choice else []
        lines += self.float8.lines() if self.float8 else []
        lines += [
            f"fastest ways of the convs at {'x'.join(map(str, shape))}: "
            + ", ".join(f"{count} {way}" for way, count in sorted(counts.items()))
            for shape, counts in self.ways.items()
        ]
        lines += [
            f"{count} CUDA stream{'s' * (count > 1)} at {'x'.join(map(str, shape))}"
            for shape, count in self.streams.items()
        ]
        lines += [
            f"torch.compile at {'x'.join(map(str, shape))}: {ratio:.2f} of eager's time, "
            + ("kept" if ratio < 1 else "not kept")
            for shape, ratio in self.compiled.items()
        ]
        lines += [
            f"torch.compile at {'x'.join(map(str, shape))}: failed, not kept ({reason})"
            for shape, reason in self.not_compiled.items()
        ]
        if self.difference is None:
            lines.append("accuracy: not measured (give compile_inference some images)")
        else:
            d = self.difference
            lines.append(
                f"accuracy on {d.images} images, against the model as given: scores differ by at most {d.scores:.2g}, "
                f"boxes by at most {d.boxes:.2g} px, {d.boxes_mean:.2g} px in the mean"
            )
        return "\n".join(lines)


def pixels_of(model: RetinaNet, image: Tensor) -> Tensor:
    """The batch (1, C, H, W) that an image becomes, float32 on the device of the model's weights."""
    weights = next(model.parameters())
    transform = model.transform
    (image,) = check_images([image.to(weights.device)], channels_of(transform), take_uint8=True)
    image = image.float() if image.is_floating_point() else image
    constants = transform.image_mean, transform.image_std
    return image_batch([image], resized_sizes(transform, [image]), *constants, transform.size_divisible)


def _scores_and_boxes(
    model: RetinaNet, layout: torch.memory_format, image: Tensor, convs: Convs = run_convs
) -> tuple[Tensor, Tensor]:
    """The scores (N, K) and boxes (N, 4) of all anchors of one image."""
    pixels = pixels_of(model, image).to(next(model.parameters()).dtype, memory_format=layout)
    outputs = run_network(model, pixels, convs=convs)
    logits = torch.cat(flatten_all(outputs.levels[LOGITS], outputs.num_classes), dim=1)[0]
    deltas = torch.cat(flatten_all(outputs.levels[DELTAS], box_channels(outputs.reg_max)), dim=1)[0]
    return logits.float().sigmoid(), decode(deltas.float(), outputs.anchors)


@torch.no_grad()
def difference(model: RetinaNet, own: RetinaNet, images: Sequence[Tensor], convs: Convs = run_convs) -> Difference:
    """How far the model of an engine is from the model that it was made of, over images taken one by one.

    Args:
        model: as the user gave it, in evaluation mode.
        own: the engine's, folded and in the engine's dtype.
        images: ``(C, H, W)`` each, floating point in [0, 1] or uint8.
        convs: what runs the trunk and heads of ``own``.
    """
    largest_score, largest_box, moved, coordinates = 0.0, 0.0, 0.0, 0
    for image in images:
        scores, boxes = _scores_and_boxes(model, torch.preserve_format, image)
        own_scores, own_boxes = _scores_and_boxes(own, torch.channels_last, image, convs)
        counts = scores.amax(dim=1) > model.score_thresh
        away = (own_boxes - boxes)[counts].abs()
        largest_score = max(largest_score, float((own_scores - scores).abs().max()))
        largest_box = max(largest_box, float(away.max()) if len(away) else 0.0)
        moved, coordinates = moved + float(away.sum()), coordinates + away.numel()
    return Difference(len(images), largest_score, largest_box, moved / max(1, coordinates))

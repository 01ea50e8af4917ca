"""What an engine did to its model, and how far its outputs are from the model's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retina_fast.anchors import shared_anchors
from retina_fast.kernels.box_decode import decode
from retina_fast.kernels.image_batch import image_batch
from retina_fast.kernels.levels import flatten_all
from retina_fast.model import RetinaNet
from retina_fast.transform import check_images, resized_sizes

if TYPE_CHECKING:
    from retina_fast.deploy.engine import Engine


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
class Report:
    """What the engine did to the model, and what it cost."""

    device: str
    dtype: torch.dtype
    norms: int
    folded: int
    graphs: bool
    max_shapes: int
    difference: Difference | None = None
    compiled: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Of each batch shape on which torch.compile was tried: its time over eager's; it is kept below 1."""

    def __str__(self) -> str:
        way = "one CUDA graph a batch shape" if self.graphs else "no CUDA graphs"
        lines = [
            f"RetinaNet engine on {self.device}: {str(self.dtype).removeprefix('torch.')}, channels_last",
            f"BatchNorm folded into convs: {self.folded} of {self.norms}",
            f"{way}; at most {self.max_shapes} batch shapes kept ready",
        ]
        lines += [
            f"torch.compile at {'x'.join(map(str, shape))}: {ratio:.2f} of eager's time, "
            + ("kept" if ratio < 1 else "not kept")
            for shape, ratio in self.compiled.items()
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


def _scores_and_boxes(
    model: RetinaNet, dtype: torch.dtype, layout: torch.memory_format, image: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one image, every anchor's scores (N, K) and box (N, 4)."""
    device = next(model.parameters()).device
    (image,) = check_images([image.to(device)], 1, take_uint8=True)
    transform = model.transform
    constants = transform.image_mean, transform.image_std
    sizes = resized_sizes(transform, [image])
    batch = image_batch([image], sizes, *constants, transform.size_divisible).to(dtype, memory_format=layout)
    batch, features = model._trunk(batch)
    outputs = model._head_outputs(features)
    anchors = shared_anchors(model.anchor_generator, batch, features)
    outputs = model._by_level(outputs, [level.shape[2] * level.shape[3] for level in features], anchors)
    logits = torch.cat(flatten_all(outputs["cls_logits"], model._num_classes(outputs)), dim=1)[0]
    deltas = torch.cat(flatten_all(outputs["bbox_regression"], 4), dim=1)[0]
    return logits.float().sigmoid(), decode(deltas.float(), anchors)


@torch.no_grad()
def difference(model: RetinaNet, engine: "Engine", images: Sequence[Tensor]) -> Difference:
    """How far the engine is from the model it was made of, over images taken one by one."""
    largest_score, largest_box, moved, coordinates = 0.0, 0.0, 0.0, 0
    dtype = next(model.parameters()).dtype
    for image in images:
        scores, boxes = _scores_and_boxes(model, dtype, torch.preserve_format, image)
        own_scores, own_boxes = _scores_and_boxes(engine.model, engine.report.dtype, torch.channels_last, image)
        counts = scores.amax(dim=1) > model.score_thresh
        away = (own_boxes - boxes)[counts].abs()
        largest_score = max(largest_score, float((own_scores - scores).abs().max()))
        largest_box = max(largest_box, float(away.max()) if len(away) else 0.0)
        moved, coordinates = moved + float(away.sum()), coordinates + away.numel()
    return Difference(len(images), largest_score, largest_box, moved / max(1, coordinates))

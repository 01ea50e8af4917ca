"""Pictures with boxes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from retina_fast.predict.lettering import lettering, load

# The palette of Okabe and Ito, whose colours people with any colour vision can tell apart.
PALETTE = ("#F0E442", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")


def draw_boxes(image: Tensor, boxes: Tensor, colors: Sequence[str], texts: Sequence[str] | None = None) -> Tensor:
    """A copy of the image with boxes drawn on it.

    Args:
        image: (3, H, W) uint8.
        boxes: (D, 4) xyxy in pixels.
        colors: D colour names.
        texts: D texts in any script; a text that is wider than its box is left out, since it would hide the neighbours.

    Example::

        >>> picture = draw_boxes(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[8.0, 8, 40, 40]]), ["red"])
        >>> picture.shape
        torch.Size([3, 64, 64])
    """
    if not len(boxes):
        return image.clone()
    file, size, shown = lettering(texts or [])
    font = load(file, size)
    fitting: Any = [None] * len(boxes)
    for i, (text, width) in enumerate(zip(texts or [], (boxes[:, 2] - boxes[:, 0]).tolist(), strict=bool(texts))):
        if text and font.getlength(shown[text]) <= width:
            fitting[i] = shown[text]
    width = 2 + max(image.shape[1:]) // 1500
    return draw_bounding_boxes(image, boxes, fitting, list(colors), width=width, font=file, font_size=file and size)


def draw_detections(image: Tensor, detections: dict[str, Tensor], classes: Sequence[str]) -> Tensor:
    """A copy of the image with its detections in a colour for each class, with their scores where these fit.

    Args:
        image: (3, H, W) uint8.
        detections: `boxes` (D, 4) xyxy in pixels, `scores` (D,), `labels` (D,).
        classes: the K class names. With more than one, they are written beside the scores.

    Example::

        >>> picture = draw_detections(image, model([image / 255])[0], ["Tree"])  # doctest: +SKIP
    """
    labels = detections["labels"].tolist()
    names = [f"{classes[label]} " if len(classes) > 1 else "" for label in labels]
    texts = [f"{name}{score:.2f}" for name, score in zip(names, detections["scores"].tolist(), strict=True)]
    return draw_boxes(image, detections["boxes"], [PALETTE[label % len(PALETTE)] for label in labels], texts)


def above(detections: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    """The detections whose score is at least `score`.

    Example::

        >>> above({"scores": torch.tensor([0.9, 0.1])}, 0.5)
        {'scores': tensor([0.9000])}
    """
    keep: Tensor = torch.ge(detections["scores"], score)
    return {name: value[keep] for name, value in detections.items()}

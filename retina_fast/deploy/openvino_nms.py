"""Suppression of overlapping boxes by OpenVINO, in engines whose trunk and heads it runs.

OpenVINO compares a box with 8 or 16 kept ones at a time, until one suppresses it. Thousands of boxes of one class
take a fifth of the time of NumPy's way, and those of many classes, which it has to look for one by one, more. On x86 it
computes an IoU step by step as torchvision does, so that the same boxes stay.
"""

import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina_fast.deploy.openvino_graph import cpu_options
from retina_fast.kernels.batched_nms import Kept, batched_nms, thresholds_of

_BOXES = 256, 2**20  # of an image: for fewer NumPy is faster, and for more the ranks of all classes take much memory
_CLASSES = 8  # for more NumPy is faster
_LEAST = float(np.finfo(np.float32).tiny)  # of the threshold, since numbers that are smaller may become 0


class OpenVinoNms:
    """:func:`retina_fast.kernels.batched_nms.batched_nms` of boxes on a CPU that lie best first.

    It is that function that runs for few boxes, for many classes, at thresholds outside (0, 1], and on other processors
    than x86.

    Raises:
        ModuleNotFoundError: without the package ``openvino``.
    """

    def __init__(self) -> None:
        import openvino
        from openvino import opset13

        boxes, scores, most, thresh = (
            opset13.parameter(openvino.PartialShape(shape), kind)
            for shape, kind in (([-1, -1, 4], np.float32), ([-1, -1, -1], np.float32), ([], np.int32), ([], np.float32))
        )
        ways: Any = {"sort_result_descending": False, "output_type": "i32"}
        nms = opset13.non_max_suppression(boxes, scores, most, thresh, np.float32(0), **ways)
        model = openvino.Model([nms.output(0), nms.output(2)], [boxes, scores, most, thresh])
        self._compiled = openvino.Core().compile_model(model, "CPU", cpu_options())

    def __call__(
        self, boxes: Tensor, scores: None, labels: Tensor, counts: Tensor, iou_thresh: float, max_detections: int
    ) -> Kept:
        """See the class.

        Args:
            boxes: ``(B, M, 4)`` float32 xyxy, best first.
            scores: none, since the boxes lie best first.
            labels: ``(B, M)`` integers, at least 0 where a box counts.
            counts: ``(B,)``.
            iou_thresh: a box goes when its IoU with a better kept one of its class is strictly above.
            max_detections: D.
        """
        batch, width = labels.shape
        classes = int(labels.max()) + 1 if labels.numel() else 0
        same_arithmetic = platform.machine() in ("x86_64", "AMD64") and _LEAST <= iou_thresh <= 1
        if not same_arithmetic or not 0 < classes <= _CLASSES or not _BOXES[0] < width <= _BOXES[1]:
            return batched_nms(boxes, scores, labels, counts, iou_thresh, max_detections)
        ranks = torch.arange(width, 0, -1, dtype=torch.float32) * (torch.arange(width) < counts[:, None])
        by_class = ranks.new_zeros(batch, classes, width).scatter_(1, labels.clamp(min=0)[:, None], ranks[:, None])
        # OpenVINO lets a box go from the threshold on, and torchvision above it. What has a rank of 0 does not count.
        given = (
            boxes,
            by_class,
            torch.tensor(max_detections, dtype=torch.int32),
            torch.tensor(thresholds_of(iou_thresh)[1], dtype=torch.float32),
        )
        outputs = self._compiled([tensor.numpy() for tensor in given], share_inputs=True)
        found = outputs[0][: int(outputs[1][0])].astype(np.int64)  # (N, 3): image, class and position
        places = torch.from_numpy(np.sort(found[:, 0] * width + found[:, 2]))
        images = places // width
        kept = torch.bincount(images, minlength=batch)
        columns = torch.arange(len(places)) - (kept.cumsum(0) - kept)[images]
        first = columns < max_detections
        positions = places.new_zeros(batch, max_detections)
        positions[images[first], columns[first]] = places[first] % width
        return Kept(positions, kept.clamp(max=max_detections))

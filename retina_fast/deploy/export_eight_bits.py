"""An exported ONNX graph in eight bits, calibrated and compared with float32 on the user's images."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retina_fast.deploy.export_onnx import OUTPUTS, onnx_session
from retina_fast.deploy.kept import COMPARED, Found, compare
from retina_fast.deploy.quantize import Quantizer
from retina_fast.detections import Detections


def eight_bits(proto: Any, images: Iterable[Tensor]) -> tuple[Any, dict[str, Any]]:
    """The graph in eight bits, and what it cost.

    Args:
        proto: the ModelProto of an export in float32, which does not change.
        images: for calibration, from :func:`retina_fast.deploy.calibration.calibration_images`.

    Returns:
        The new ModelProto, and what is written into the metadata: a ``summary`` in words, how many images it is
        ``calibrated_with``, how many ``layers`` it has in eight bits, and the attributes of
        :class:`retina_fast.deploy.kept.Kept`.

    Raises:
        UserError: for images that cannot serve, and for a model without a conv to be quantised.

    Warns:
        UserWarning: for few images, for images in which nothing is found, and if detections change by more than the
            bound of ``kept.py``.
    """
    takes_uint8 = proto.graph.input[0].type.tensor_type.elem_type == 2  # TensorProto.UINT8
    compared: list[Any] = []
    count = 0

    def feeds() -> Iterator[Any]:
        nonlocal count
        for image in images:
            count += 1
            if takes_uint8 and image.is_floating_point():
                image = (image * 255).round().to(torch.uint8)
            feed = image.detach().cpu()[None].numpy()  # (1, 3, H, W)
            if len(compared) < COMPARED:
                compared.append(feed)
            yield feed

    quantizer = Quantizer(proto, feeds())
    made = quantizer.quantized()
    before, after = (onnx_session(graph.SerializeToString()) for graph in (proto, made))
    kept = compare((_detections(before, feed), _detections(after, feed)) for feed in compared)
    kept.warn("the exported file", stacklevel=3)
    layers = len(quantizer.layers)
    summary = f"{layers} layers in eight bits, calibrated with {count} images: {kept}"
    return made, {"summary": summary, "calibrated_with": count, "layers": layers, **asdict(kept)}


def _detections(session: Any, feed: Any) -> Found:
    outputs = session.run(list(OUTPUTS), {"images": feed})
    return Detections(*map(torch.from_numpy, outputs)).to_list()[0]

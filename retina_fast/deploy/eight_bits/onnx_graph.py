"""An exported ONNX graph in eight bits, calibrated and compared with float32 on the user's images."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retina_fast.deploy.eight_bits.agreement import COMPARED, SEARCHED, Found, compare
from retina_fast.deploy.eight_bits.quantize import Quantizer
from retina_fast.deploy.export.onnx_file import OUTPUTS, onnx_session
from retina_fast.detections import Detections


def eight_bits(
    proto: Any, images: Iterable[Tensor], float32_share: float = 0.0, symmetric: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The graph in eight bits, and what it cost.

    Args:
        proto: the ModelProto of an export in float32, which does not change.
        images: for calibration, from :func:`retina_fast.deploy.eight_bits.calibration.calibration_images`.
        float32_share: how much of the work may stay in float32, see
            :meth:`retina_fast.deploy.eight_bits.quantize.Quantizer.most_changing`.
        symmetric: as TensorRT has it, see :class:`retina_fast.deploy.eight_bits.quantize.Quantizer`.

    Returns:
        The new ModelProto, and what is written into the metadata: a ``summary`` in words, how many images it is
        ``calibrated_with``, how many ``layers`` it has in eight bits, the names of the weights of the
        ``float32_layers``, and the attributes of :class:`retina_fast.deploy.eight_bits.agreement.Kept`.

    Raises:
        UserError: for images that cannot serve, and for a model without a conv to be quantised.

    Warns:
        UserWarning: for few images, for images in which nothing is found, and if detections change by more than the
            bound of ``agreement.py``.
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

    quantizer = Quantizer(proto, feeds(), symmetric)
    left = quantizer.most_changing(float32_share, compared[:SEARCHED]) if float32_share else []
    made = quantizer.quantized(left)
    before, after = (onnx_session(graph.SerializeToString()) for graph in (proto, made))
    kept = compare((_detections(before, feed), _detections(after, feed)) for feed in compared)
    kept.warn("the exported file", stacklevel=3)
    layers = len(quantizer.layers) - len(left)
    summary = f"{layers} layers in eight bits, {len(left)} left in float32, calibrated with {count} images: {kept}"
    about = {"summary": summary, "calibrated_with": count, "layers": layers, "float32_layers": left}
    return made, about | asdict(kept)


def _detections(session: Any, feed: Any) -> Found:
    outputs = session.run(list(OUTPUTS), {"images": feed})
    return Detections(*map(torch.from_numpy, outputs)).to_list()[0]

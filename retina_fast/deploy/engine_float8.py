"""An engine whose 1x1 convs may compute in FP8 (E4M3): calibrated, and its cost measured."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from retina_fast.deploy.eight_bits.agreement import COMPARED, Found, compare
from retina_fast.deploy.eight_bits.float8 import calibrate_float8, everywhere
from retina_fast.deploy.plan import EngineSettings
from retina_fast.deploy.report import Difference, Float8, difference
from retina_fast.model import RetinaNet


def add_float8(model: RetinaNet, engine: Any, images: Sequence[Tensor], way: str) -> tuple[Float8, Difference]:
    """Let an engine's 1x1 convs compute in FP8, and measure what it costs where all of them do.

    Args:
        model: in evaluation mode, as the user gave it.
        engine: of it, in half precision.
        images: for calibration, uint8 or floating point. Detections are compared in the first 16.
        way: ``float8``, or ``simulated``.

    Raises:
        UserError: see :func:`retina_fast.deploy.eight_bits.float8.calibrate_float8`.

    Warns:
        UserWarning: for few images, and if detections change by more than the bound of ``agreement.py``.
    """
    convs, count = calibrate_float8(engine.model, images)
    dtype, device = engine.settings.dtype, next(model.parameters()).device
    trial = type(engine)(engine.model, EngineSettings(dtype, graphs=False, max_shapes=0), engine.report)

    @torch.no_grad()
    def pairs() -> Iterator[tuple[Found, Found]]:
        for image in images[:COMPARED]:
            image = image.to(device)
            yield model([image if image.is_floating_point() else image.float() / 255])[0], trial([image])[0]

    with everywhere(engine.model, way):
        away = difference(model, engine.model, images)
        kept = compare(pairs())
    kept.warn("the engine", "give more images for calibration, or compute in bfloat16", stacklevel=4)
    return Float8(convs, count, way == "simulated", kept), away

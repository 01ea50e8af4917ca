"""What FP8 would cost in detections, without a GPU that has it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import retinanet as tv

from retina_fast.convert import copied, from_torchvision
from retina_fast.deploy.eight_bits.float8 import float8_convs
from retina_fast.deploy.engine import Engine, compile_inference
from retina_fast.deploy.engine_float8 import add_float8


@torch.inference_mode(False)
def simulate_float8(model: tv.RetinaNet, images: Sequence[Tensor], dtype: torch.dtype = torch.bfloat16) -> Engine:
    """An engine that computes what ``compile_inference(model, images, torch.float8_e4m3fn)`` does where all 1x1 convs
    that may are in FP8: inputs and weights are rounded to E4M3 and multiplied in float32. It runs on any device.

    ``print`` it to see what FP8 costs on the images, or judge it by ``retina_fast.predict.evaluate``. It is slow.

    Args:
        model: a RetinaNet of this package or of torchvision.
        images: for calibration, ``(C, H, W)`` each, floating point in [0, 1] or uint8: at least 8, better 50.
        dtype: of all else; an FP8 engine on a GPU has bfloat16.

    Raises:
        UserError: for images that cannot serve, or a model without a 1x1 conv with channels in multiples of 16.

    Warns:
        UserWarning: for few images, and if detections change by more than the bound of ``agreement.py``.

    Example::

        >>> engine = simulate_float8(model, photographs)  # doctest: +SKIP
        >>> print(engine.report.float8.kept)  # doctest: +SKIP
        137 of 138 detections kept and 0 new in 12 images; scores differ by at most 0.013, boxes by at most 1.1 px
    """
    engine = compile_inference(model, dtype=dtype)
    plain = from_torchvision(model)
    plain = copied(plain).eval() if plain.training else plain
    engine.report.float8, engine.report.difference = add_float8(plain, engine, images, "simulated")
    for conv in float8_convs(engine.model):
        conv.always = "simulated"
    return engine

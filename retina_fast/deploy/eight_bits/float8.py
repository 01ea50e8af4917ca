"""FP8 for the 1x1 convs of an engine: the scales of their inputs, from the user's images."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits.calibration import calibration_images
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.report import pixels_of
from retina_fast.device import has_float8
from retina_fast.forward import run_convs
from retina_fast.kernels.conv_float8 import LARGEST, MULTIPLE, suits_float8
from retina_fast.model import RetinaNet

_ROOM = 4.0
"""How many times the largest magnitude of the images fits: E4M3 is as precise there, and other images may exceed it."""
_FEWEST = 2.0
"""Down to this the largest magnitude may lie: below 2^-6 the steps of E4M3 no longer shrink with the values."""


def require_float8(device: torch.device) -> None:
    """Raise UserError unless the device multiplies matrices in FP8 (E4M3)."""
    if has_float8(device):
        return
    what = str(device)
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        what += f" ({name}, " + ("of AMD)" if torch.version.hip else "{}.{})".format(*capability))
    raise UserError(
        "dtype=torch.float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or newer, but the model is on "
        f"{what}: retina_fast.deploy.simulate.simulate_float8 says what FP8 would cost"
    )


def input_factor(largest: float) -> float:
    """The power of two by which a conv's inputs are multiplied before they are rounded to FP8.

    It is 1 where the largest magnitude then lies between 2 and 112, which costs a pass less; else the nearest to it.

    Example::

        >>> input_factor(20.0), input_factor(1000.0), input_factor(0.3)
        (1.0, 0.0625, 8.0)
    """
    if not largest:
        return 1.0
    most = math.floor(math.log2(LARGEST / _ROOM / largest))
    least = math.ceil(math.log2(_FEWEST / largest))
    return 2.0 ** min(max(0, least), most)


def float8_convs(model: nn.Module) -> list[FusedConv]:
    """The convs of a model, fused, that may compute in FP8."""
    convs = [module for module in model.modules() if isinstance(module, FusedConv)]
    return [conv for conv in convs if conv.is_pointwise() and suits_float8(conv.weight)]


@torch.no_grad()
def calibrate_float8(model: RetinaNet, images: Iterable[Tensor]) -> tuple[int, int]:
    """Let the 1x1 convs of an engine's model compute in FP8, with scales for what they read of these images.

    Args:
        model: of an engine, in evaluation mode, folded, fused, in its dtype and on its device.
        images: uint8 or floating point in [0, 1]; one is held at a time.

    Returns:
        how many convs may compute in FP8 now, and how many images there were.

    Raises:
        UserError: for images that cannot serve, a model without such convs, or activations that are not finite.

    Warns:
        UserWarning: for few images.
    """
    convs = float8_convs(model)
    if not convs:
        raise UserError(
            f"dtype=torch.float8_e4m3fn: the model has no 1x1 conv with channels in multiples of {MULTIPLE} that could "
            "compute in FP8"
        )
    largest: dict[FusedConv, Tensor] = {}

    def saw(conv: FusedConv, x: Tensor) -> None:
        found = x.abs().amax().float()  # stays on the device
        largest[conv] = torch.maximum(largest[conv], found) if conv in largest else found

    def watch(conv: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(conv, FusedConv)
        saw(conv, args[0])
        shortcut = keywords.get("shortcut")
        if shortcut is not None:  # run by this conv, not by a call of its own
            saw(shortcut, args[1])

    fused = [module for module in model.modules() if isinstance(module, FusedConv)]
    handles = [conv.register_forward_pre_hook(watch, with_kwargs=True) for conv in fused]
    weight, count = next(model.parameters()), 0
    try:
        for image in calibration_images(images):
            count += 1
            pixels = pixels_of(model, image).to(weight.dtype, memory_format=torch.channels_last)
            run_convs(model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    for conv in convs:
        if conv in largest:
            value = float(largest[conv])
            if not math.isfinite(value):
                names = {module: name for name, module in model.named_modules()}
                raise UserError(f"the images for calibration make the input of {names[conv]} {value}: check the model")
            conv.float8_factor = input_factor(value)
    return sum(conv.float8_factor is not None for conv in convs), count


@contextmanager
def everywhere(model: nn.Module, way: str) -> Iterator[None]:
    """Take FP8 in all convs that may, ``float8`` or ``simulated``."""
    convs = float8_convs(model)
    for conv in convs:
        conv.always = way
    try:
        yield
    finally:
        for conv in convs:
            conv.always = None


def keeps_float8(weight: Tensor) -> bool:
    """Whether an engine with such weights may compute in FP8."""
    return weight.dtype == torch.bfloat16 and has_float8(weight.device)


def forget_float8(model: nn.Module) -> None:
    """Let no conv compute in FP8 any longer."""
    for conv in float8_convs(model):
        conv.float8_factor = None

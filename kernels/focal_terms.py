"""One element of a focal loss and its slope, as the kernels of focal_loss.py compute them."""

from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.fast_math import LOG2E, exp2, log2, sigmoid


@triton.jit
def loss_and_slope(x, GAMMA: tl.constexpr, PTX: tl.constexpr):
    """p^g s and its slope p^g (g (1-p) s + p) for p = sigmoid(x), s = softplus(x); NaN gives NaN."""
    p, log1p = sigmoid(x, PTX)
    s = tl.maximum(x, 0.0) + log1p
    if GAMMA == 2:
        modulation = p * p
    elif GAMMA == 0:
        modulation = 1.0
    else:
        modulation = exp2((tl.minimum(x, 0.0) - log1p) * (GAMMA * LOG2E), PTX)  # log(p) = min(x, 0) - log1p
    return modulation * s, modulation * (GAMMA * ((1 - p) * s) + p)


@triton.jit
def soft_loss_and_slope(x, y, GAMMA: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """The loss of soft_focal_loss.py of an anchor's class with the target y > 0, and its slope; NaN gives NaN."""
    p, log1p = sigmoid(x, PTX)
    loss = log1p + (1 - y) * tl.maximum(x, 0.0) + y * tl.maximum(-x, 0.0)  # cross entropy, of terms with one sign
    d = p - y
    if KIND == "varifocal":
        return y * loss, y * d
    else:
        distance = tl.abs(d)
        if GAMMA == 2:
            power = distance
        elif GAMMA == 1:
            power = tl.where(distance > 0, 1.0, distance)
        else:
            power = exp2((GAMMA - 1) * log2(distance, PTX), PTX)
        slope = GAMMA * (tl.where(d < 0, -power, power) * (p * (1 - p))) * loss
        return power * distance * loss, slope + power * distance * d

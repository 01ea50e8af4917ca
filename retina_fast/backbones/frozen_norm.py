"""torchvision's FrozenBatchNorm2d, which in mixed precision stays in the precision of its input. In training the convs
before such norms can take them along."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import misc

from retina_fast.stock import is_stock


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """BatchNorm2d whose statistics, scale and shift are fixed, as buffers.

    If the input's dtype differs from the buffers', as under autocast, torchvision's norm returns float32, so that ReLU
    and residual sums are float32, too: several passes over twice the bytes, all kept for backward. This norm takes one
    pass: it computes in float32 and returns the input's dtype, as ``nn.BatchNorm2d`` does. If the dtypes are the same,
    its result is torchvision's to the last bit.

    Example::

        >>> import torch
        >>> norm = FrozenBatchNorm2d(8)
        >>> norm(torch.rand(1, 8, 4, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W), scaled and shifted channel by channel."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def as_torchvision(module: nn.Module) -> None:
    """Makes the frozen norms within a module torchvision's own, in place."""
    for part in module.modules():
        if type(part) is FrozenBatchNorm2d:
            part.__class__ = misc.FrozenBatchNorm2d


@contextlib.contextmanager
def frozen_norms_folded(model: nn.Module) -> Iterator[int]:
    """Within it, the convs of torchvision's ResNets compute what the frozen norms after them would, which are skipped.

    With s = norm.weight / sqrt(norm.running_var + eps), a conv takes the weights ``s W`` and adds the norm's shift. The
    gradient of ``s W`` flows to W, times s. So a norm's two passes forward and one backward over the conv's output
    become passes over its weights. Convs and norms with hooks, or of a class of the user's own, run as they are.

    Yields:
        How many norms are folded.

    Example::

        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
        >>> x = torch.rand(1, 3, 8, 8)
        >>> expected = model(x)
        >>> with frozen_norms_folded(model) as count:
        ...     count, torch.allclose(model(x), expected, atol=1e-6)
        (1, True)
    """
    pairs = _pairs(model)
    try:
        for conv, norm in pairs:
            conv.forward, norm.forward = partial(_conv_and_norm, conv, norm), _identity
        yield len(pairs)
    finally:
        for pair in pairs:
            for module in pair:
                vars(module).pop("forward", None)


def _identity(x: Tensor) -> Tensor:
    return x


def _conv_and_norm(conv: Any, norm: Any, x: Tensor) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias + ((0 if conv.bias is None else conv.bias) - norm.running_mean) * scale
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)


def _pairs(model: nn.Module) -> list[tuple[Any, Any]]:
    """The convs and the frozen norms that follow them, each in one place only."""
    places = Counter(child for part in model.modules() for child in part._modules.values())
    found = [pair for part in model.modules() for pair in _followers(part) if _is_pair(*pair)]
    return [pair for pair in found if all(places[module] == 1 for module in pair)]


def _followers(part: Any) -> list[tuple[Any, Any]]:
    """The children of a part whose input is the output of another and nothing else reads that, with that other."""
    if any(is_stock(part, cls, "forward") for cls in (BasicBlock, Bottleneck)):
        return [(getattr(part, f"conv{n}"), getattr(part, f"bn{n}")) for n in (1, 2, 3) if hasattr(part, f"conv{n}")]
    if any(is_stock(part, cls, "forward") for cls in (nn.Sequential, IntermediateLayerGetter)):
        returned = getattr(part, "return_layers", ())
        return [(one, other) for (name, one), (_, other) in pairwise(part._modules.items()) if name not in returned]
    return []


def _is_pair(conv: Any, norm: Any) -> bool:
    return (
        is_stock(conv, nn.Conv2d, "forward", "_conv_forward")
        and any(is_stock(norm, cls, "forward") for cls in (misc.FrozenBatchNorm2d, FrozenBatchNorm2d))
        and conv.weight.dtype == norm.weight.dtype
    )

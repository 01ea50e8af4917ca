"""A model's convs in training with what follows each: a frozen norm in its weights, bias, residual sum and ReLU in one
pass behind it. The engine, whose model nobody trains or reads, changes the modules for good (`deploy/fusion/fuse.py`).
"""

import contextlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, misc

from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d
from retina_fast.kernels.first_channels import first_channels, padded_weight, suits_padding
from retina_fast.kernels.fused_conv import fused_conv
from retina_fast.kernels.max_pool_relu import max_pool_relu
from retina_fast.kernels.stem_conv import stem_conv
from retina_fast.stock import is_plain_conv, is_stem_pooling, is_stock

_NORMS = (misc.FrozenBatchNorm2d, FrozenBatchNorm2d)
_CHAINS = (nn.Sequential, IntermediateLayerGetter, misc.Conv2dNormActivation)
_BUFFERS = "weight", "bias", "running_mean", "running_var"
_PYRAMID_METHODS = "get_result_from_inner_blocks", "get_result_from_layer_blocks"


class _Weight(torch.autograd.Function):
    """A conv's weights times a frozen norm's scale, in the dtype and memory format that the conv computes in, by one
    pass over them; and one for their gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, layout: Any) -> Tensor:
        ctx.scale, ctx.like = scale, weight
        ready = torch.empty_like(weight, dtype=dtype, memory_format=layout)
        return ready.copy_(weight) if scale is None else torch.mul(weight, scale, out=ready)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if torch.is_grad_enabled():  # somebody differentiates once more
            scaled = gradient.to(ctx.like.dtype)
            return scaled if ctx.scale is None else scaled * ctx.scale, None, None, None
        own = torch.empty_like(ctx.like)
        return own.copy_(gradient) if ctx.scale is None else torch.mul(gradient, ctx.scale, out=own), None, None, None


class _Conv:
    """A conv, and the frozen norm behind it if there is one; its weights are made ready once, at the first call."""

    scale: Tensor | None = None  # of the norm, by channel, as :func:`_scale_norms` sets them
    shift: Tensor | None = None

    def __init__(self, conv: Any, norm: Any = None) -> None:
        self.conv, self.norm = conv, norm
        self._ready: Tensor | None = None

    def __call__(self, x: Tensor, z: Tensor | None = None, relu: bool = False) -> Tensor:
        weight, bias = self.ready(x)
        conv = self.conv
        return fused_conv(x, weight, bias, z, relu, conv.stride, conv.padding, conv.dilation, conv.groups)

    def ready(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and bias for an input."""
        conv, kind = self.conv, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else conv.weight.dtype
        if self._ready is None:
            scale = None if self.scale is None else self.scale[:, None, None, None]
            layout = torch.channels_last if kind == "cuda" else torch.preserve_format
            as_it_is = scale is None and dtype == conv.weight.dtype and kind != "cuda"
            self._ready = conv.weight if as_it_is else _Weight.apply(conv.weight, scale, dtype, layout)
        bias = conv.bias
        if self.scale is not None:
            bias = self.shift if bias is None else bias * self.scale + self.shift
        return self._ready, bias


class _LastConv(_Conv):
    """A conv that nothing but its bias follows."""

    _padded: Tensor | None = None  # its weights with channels up to a multiple of 8

    def __call__(self, x: Tensor, z: Tensor | None = None, relu: bool = False) -> Tensor:
        weight, bias = self.ready(x)
        conv = self.conv
        if bias is None or not suits_padding(weight, bias, conv.groups):
            return super().__call__(x)
        if self._padded is None:
            self._padded = padded_weight(weight)
        return first_channels(F.conv2d(x, self._padded, None, conv.stride, conv.padding, conv.dilation), bias)


def _scale_norms(convs: Sequence[_Conv]) -> None:
    """Compute the scales and shifts of all norms together: a handful of launches, where each norm alone takes four."""
    groups: dict[Any, list[_Conv]] = defaultdict(list)
    for conv in convs:
        if conv.norm is not None:
            groups[conv.norm.eps, conv.norm.weight.dtype].append(conv)
    for (eps, _), group in groups.items():
        weight, bias, mean, var = (torch.cat([getattr(conv.norm, name) for conv in group]) for name in _BUFFERS)
        scale = weight * (var + eps).rsqrt()
        shift = bias - mean * scale
        sizes = [len(conv.norm.weight) for conv in group]
        for conv, own_scale, own_shift in zip(group, scale.split(sizes), shift.split(sizes), strict=True):
            conv.scale, conv.shift = own_scale, own_shift


def lay_out_weights(model: nn.Module) -> None:
    """Bring the convs' weights into channels_last memory, as cuDNN reads them, so that casting them is a plain copy.
    Shapes and values stay; ``state_dict``, loading and copies work as before.

    Example::

        >>> model = nn.Conv2d(3, 4, 3)
        >>> lay_out_weights(model)
        >>> model.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    for weight in (p for p in model.parameters() if p.dim() == 4):
        if not weight.is_contiguous(memory_format=torch.channels_last):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _block(convs: list[_Conv], block: Any, x: Tensor) -> Tensor:
    """A residual block."""
    identity = x if block.downsample is None else block.downsample(x)
    *convs, last = convs
    for conv in convs:
        x = conv(x, relu=True)
    return last(x, identity, relu=True)


def _stem(conv: _Conv, x: Tensor) -> Tensor:
    """The conv, ReLU and pooling by which a ResNet begins, where no gradient flows through them."""
    if not x.is_cuda or x.requires_grad:
        return F.max_pool2d(conv(x, relu=True), 3, 2, 1)
    weight, bias = conv.ready(x)
    return max_pool_relu(stem_conv(x.to(weight.dtype), weight), bias)


def _pyramid(convs: list[_Conv], pyramid: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """A feature pyramid, whose convs add the level above; autocast would have them sum in float32."""
    names, maps = list(x), list(x.values())
    above = convs[-1](maps[-1])
    results = [pyramid.layer_blocks[-1](above)]
    for i in range(len(maps) - 2, -1, -1):
        above = convs[i](maps[i], above)
        results.insert(0, pyramid.layer_blocks[i](above))
    if pyramid.extra_blocks is not None:
        results, names = pyramid.extra_blocks(results, maps, names)
    return OrderedDict(zip(names, results, strict=True))


def _identity(x: Tensor) -> Tensor:
    return x


@contextlib.contextmanager
def convs_fused(model: nn.Module) -> Iterator[int]:
    """Within it, the convs of torchvision's parts take along what follows them: frozen norms, bias, sums and ReLUs.

    With s = norm.weight / sqrt(norm.running_var + eps), a conv before a frozen norm takes the weights ``s W`` and adds
    the norm's shift; the gradient of ``s W`` flows to W, times s. So a norm's passes over the conv's output become
    passes over its weights. Scales and shifts are computed, and weights brought into the dtype of the conv, once;
    weights that change need a new context. What has hooks, is of a class of the user's own or stands in several places
    runs as it is.

    Yields:
        How many norms are folded.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU())
        >>> x = torch.rand(1, 3, 8, 8)
        >>> expected = model(x)
        >>> with convs_fused(model) as count:
        ...     count, torch.allclose(model(x), expected, atol=1e-6)
        (1, True)
    """
    forwards, convs = _forwards(model)
    _scale_norms(convs)
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield sum(conv.norm is not None for conv in convs)
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _forwards(model: nn.Module) -> tuple[dict[Any, Callable[..., Any]], list[_Conv]]:
    """What the modules run in place of their own forward, and the convs that take something along."""
    parts, places = _walk(model)
    forwards: dict[Any, Callable[..., Any]] = {}
    convs: list[_Conv] = []
    for part in parts:
        kind: Any = type(part)
        if kind in (BasicBlock, Bottleneck) and is_stock(part, kind, "forward"):
            block: Any = part
            numbers = (1, 2) if kind is BasicBlock else (1, 2, 3)
            pairs = [(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in numbers]
            alone = all(places[module] == 1 for pair in pairs for module in pair)
            if alone and all(_is_pair(*pair) for pair in pairs) and is_stock(block.relu, nn.ReLU, "forward"):
                own = [_Conv(*pair) for pair in pairs]
                forwards[part] = partial(_block, own, part)
                convs += own
        elif kind in _CHAINS and is_stock(part, kind, "forward"):
            convs += _fuse_chain(part, places, forwards)
        elif kind is FeaturePyramidNetwork and is_stock(part, kind, "forward", *_PYRAMID_METHODS):
            inner: Any = part.inner_blocks
            if all(len(block) == 1 and is_plain_conv(block[0]) and places[block[0]] == 1 for block in inner):
                own = [_Conv(block[0]) for block in inner]
                forwards[part] = partial(_pyramid, own, part)
                convs += own
    for part in parts:
        if is_plain_conv(part) and part not in forwards and part.bias is not None:
            forwards[part] = _LastConv(part)
    return forwards, convs


def _walk(model: nn.Module) -> tuple[list[nn.Module], Counter[nn.Module]]:
    """Every module once, and in how many places of others each stands. An uncaptured step walks through the model, so
    that it may change; ``modules()`` takes three times as long, since it builds names."""
    parts, places = [model], Counter[nn.Module]()
    for part in parts:
        for child in part._modules.values():
            if child is not None:
                if child not in places:
                    parts.append(child)
                places[child] += 1
    return parts, places


def _fuse_chain(chain: Any, places: Mapping[Any, int], forwards: dict[Any, Callable[..., Any]]) -> list[_Conv]:
    """The convs of a chain take along a frozen norm and a ReLU behind them, which do nothing then."""
    returned = getattr(chain, "return_layers", ())  # what an IntermediateLayerGetter returns of its chain
    parts = list(chain._modules.items())
    convs: list[_Conv] = []
    for i, (name, conv) in enumerate(parts):
        if not is_plain_conv(conv) or places[conv] > 1:
            continue
        behind, taken = parts[i + 1 :], dict.fromkeys(("norm", "relu", "pool"))
        fitting: dict[str, Callable[[Any], bool]] = {
            "norm": partial(_is_pair, conv),
            "relu": _is_relu,
            "pool": partial(_ends_stem, conv, taken),
        }
        for kind, fits in fitting.items():
            if behind and name not in returned and places[behind[0][1]] == 1 and fits(behind[0][1]):
                (name, taken[kind]), *behind = behind
        if any(taken.values()):
            own = _Conv(conv, taken["norm"])
            forwards[conv] = partial(_stem, own) if taken["pool"] else partial(own, relu=taken["relu"] is not None)
            forwards.update({part: _identity for part in taken.values() if part is not None})
            convs.append(own)
    return convs


def _is_relu(module: object) -> bool:
    return is_stock(module, nn.ReLU, "forward")


def _ends_stem(conv: Any, taken: Mapping[str, Any], pool: Any) -> bool:
    """Whether it is the pooling of a ResNet's frozen stem, whose conv has taken a ReLU."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.in_channels
    is_stem = geometry == ((7, 7), (2, 2), (3, 3), (1, 1), 1, 3) and taken["relu"] is not None
    return is_stem and is_stem_pooling(pool) and not any(p.requires_grad for p in conv.parameters())


def _is_pair(conv: Any, norm: Any) -> bool:
    """Whether a conv may take along a norm."""
    return (
        is_plain_conv(conv)
        and any(is_stock(norm, cls, "forward") for cls in _NORMS)
        and conv.weight.dtype == norm.weight.dtype
    )

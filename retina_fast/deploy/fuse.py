"""Convs that take their bias, activation and residual sum with them, in a model whose norms are folded.

The modules are changed where they stand: a conv becomes a ``FusedConv``, which applies the activation in place of its
block. Parameters keep their names. What has hooks, or is of a class that is not known here, stays as it is, layer by
layer.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation

from retina_fast.backbones.spinenet import Residual
from retina_fast.kernels.conv_onednn import onednn_conv, pack_weight, runs_onednn
from retina_fast.kernels.conv_relu import conv_add_relu, conv_relu, output_shape
from retina_fast.stock import has_hooks, is_stock

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish"}
_APPLY = {"none": lambda x: x, "relu": F.relu, "swish": F.silu}


class FusedConv(nn.Conv2d):
    """A conv followed by an activation: ``activation(conv(x) + z)``, where z may be left out.

    On a CPU its weights are packed into oneDNN's own memory format at the first call, and again after they change.
    """

    activation = "none"
    """``none``, ``relu`` or ``swish``."""
    _packed: tuple[object, Tensor] | None = None  # what the weights were when they were packed, and the result

    def forward(self, x: Tensor, z: Tensor | None = None, overwrite_z: bool = False) -> Tensor:
        """``x`` (B, C_in, H, W); ``z`` of the output's shape (B, C_out, H_out, W_out), whose memory the output may take
        if nobody reads it afterwards."""
        if runs_onednn(x, self.weight, self.bias, z) and x.dtype == self.weight.dtype:
            fused = self.activation if z is None or self.activation == "relu" else "none"  # a sum takes no swish
            x = x.contiguous(memory_format=torch.channels_last)
            y = onednn_conv(x, self._packed_weight(x), self.bias, z, fused, *self._geometry(), overwrite_z)
            return y if fused == self.activation else _APPLY[self.activation](y)
        if self.activation == "relu":
            more = (self.weight, self.bias) if z is None else (self.weight, self.bias, z)
            return (conv_relu if z is None else conv_add_relu)(x, *more, *self._geometry())
        y = super().forward(x)
        return _APPLY[self.activation](y if z is None else y + z)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        return output_shape(x, self.weight, *self._geometry()[:3])

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def _packed_weight(self, x: Tensor) -> Tensor:
        weight = self.weight
        state = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
        if self._packed is None or self._packed[0] != state:
            self._packed = state, pack_weight(weight, x.shape, *self._geometry())
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own: packed weights can be neither copied nor pickled."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}


def _convs(block: Any) -> list[FusedConv]:
    names = ("conv1", "conv2", "conv3") if isinstance(block, Bottleneck) else ("conv1", "conv2")
    return [getattr(block, name) for name in names]


def _run_block(block: Any, x: Tensor) -> Tensor:
    identity = x if block.downsample is None else block.downsample(x)
    *convs, last = _convs(block)
    for conv in convs:
        x = conv(x)
    return last(x, identity, overwrite_z=block.may_overwrite)


class FusedBasicBlock(BasicBlock):
    """torchvision's block, whose last conv adds the identity."""

    may_overwrite = False
    """Whether the identity's memory may be taken by the output."""

    def forward(self, x: Tensor) -> Tensor:
        return _run_block(self, x)


class FusedBottleneck(Bottleneck):
    """torchvision's block, whose last conv adds the identity."""

    may_overwrite = False
    """Whether the identity's memory may be taken by the output."""

    def forward(self, x: Tensor) -> Tensor:
        return _run_block(self, x)


class FusedResidual(Residual):
    """SpineNet's block, whose last conv adds the shortcut and applies the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        *convs, last, _ = self.branch
        for conv in convs:
            x = conv(x)
        return last[0](x, shortcut, overwrite_z=is_fused_chain(self.shortcut))


class FusedPyramid(FeaturePyramidNetwork):
    """torchvision's pyramid, whose inner convs add the level above."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        convs: list[FusedConv] = [block[0] for block in self.inner_blocks]  # type: ignore[index, misc]
        above = convs[-1](maps[-1])
        results = [self.layer_blocks[-1](above)]
        for i in range(len(maps) - 2, -1, -1):
            size = convs[i].output_shape(maps[i])[2:]
            above = convs[i](maps[i], F.interpolate(above, size=size, mode="nearest"), overwrite_z=True)
            results.insert(0, self.layer_blocks[i](above))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def count_convs(model: nn.Module) -> int:
    """How many 2-D convs the model has."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def fuse_convs(model: nn.Module, run: Callable[[], object]) -> int:
    """Fuse what can be fused, in place, and return how many convs are fused ones now.

    Args:
        model: in evaluation mode, its norms folded by :func:`retina_fast.deploy.fold.fold_batch_norm`.
        run: a forward pass of it in which every part takes part.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> fuse_convs(model, lambda: model(torch.ones(1, 3, 8, 8)))
        1
        >>> model[0].activation, model[1]
        ('relu', Identity())
    """
    calls = _Calls(model, run)
    for module in list(model.modules()):
        for cls, fuse in _FUSERS.items():
            if is_stock(module, cls, "forward"):
                fuse(module, calls)
    for module in model.modules():
        if is_plain_conv(module):
            _become_fused(module)
    for module in model.modules():
        if is_stock(module, nn.Sequential, "forward"):
            _allow_overwriting(module, calls)
    return sum(isinstance(module, FusedConv) for module in model.modules())


class _Calls:
    """How often each module is called, which tells whether a part runs as its owner's forward says: a user's code may
    call it by itself as well, and read what lies between conv and activation."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self._counts: Counter[nn.Module] = Counter()
        handles = [
            module.register_forward_hook(lambda module, *_: self._counts.update([module]))
            for module in model.modules()
            if not has_hooks(module)
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()

    def only_by(self, owner: nn.Module, *parts: nn.Module) -> bool:
        """Whether the parts have no hooks, and were called once at each call of their owner."""
        return all(self._counts[part] == self._counts[owner] > 0 for part in parts)


def is_plain_conv(module: object) -> bool:
    """Whether it is a conv of PyTorch's own class without hooks, padded with zeros, which a fused conv stands for."""
    return (
        is_stock(module, nn.Conv2d, "forward", "_conv_forward")
        and module.padding_mode == "zeros"  # type: ignore[attr-defined]
        and not isinstance(module.padding, str)  # type: ignore[attr-defined]
    )


def _is_identity(module: object) -> bool:
    return is_stock(module, nn.Identity, "forward")


def _activation(module: object) -> str | None:
    """The name of an activation that a fused conv knows."""
    return next((name for cls, name in ACTIVATIONS.items() if is_stock(module, cls, "forward")), None)


def _become_fused(conv: Any, activation: str = "none") -> None:
    conv.__class__ = FusedConv
    conv.activation = activation


def _conv_of(chain: Any) -> Any:
    """The conv of a chain that does nothing else, or None."""
    if not any(is_stock(chain, cls, "forward") for cls in (nn.Sequential, Conv2dNormActivation)):
        return None
    conv, *rest = chain
    return conv if is_plain_conv(conv) and all(map(_is_identity, rest)) else None


def is_fused_chain(chain: Any) -> bool:
    """Whether it is a chain of a fused conv and nothing else, whose output is its own."""
    if not any(is_stock(chain, cls, "forward") for cls in (nn.Sequential, Conv2dNormActivation)):
        return False
    conv, *rest = chain
    return is_stock(conv, FusedConv, "forward") and all(map(_is_identity, rest))


def _fuse_chain(chain: Any, calls: _Calls) -> None:
    """Activations that follow a conv, or a conv and its folded norm, move into the conv."""
    returned = getattr(chain, "return_layers", ())  # what an IntermediateLayerGetter returns of its chain
    conv: Any = None
    for name, part in list(chain._modules.items()):
        activation = _activation(part)
        if conv is not None and activation and calls.only_by(chain, conv, part):
            _become_fused(conv, activation)
            setattr(chain, name, nn.Identity())
        if is_plain_conv(part):
            conv = part
        elif not _is_identity(part):
            conv = None
        if name in returned:
            conv = None


def _fuse_block(block: Any, calls: _Calls) -> None:
    """The last conv adds the identity, and takes over the bias of a downsampling conv."""
    numbers = range(1, len(_convs(block)) + 1)
    convs, norms = ([getattr(block, f"{kind}{number}") for number in numbers] for kind in ("conv", "bn"))
    if not (all(map(is_plain_conv, convs)) and all(map(_is_identity, norms)) and calls.only_by(block, *convs)):
        return
    if _activation(block.relu) != "relu":
        return
    down, last = _conv_of(block.downsample), convs[-1]
    if down is not None and calls.only_by(block, down) and down.bias is not None and last.bias is not None:
        last.bias = nn.Parameter(last.bias + down.bias, requires_grad=False)
        down.bias = None
    for conv in convs:
        _become_fused(conv, "relu")
    block.__class__ = FusedBottleneck if isinstance(block, Bottleneck) else FusedBasicBlock


def _allow_overwriting(chain: Any, calls: _Calls) -> None:
    """A fused block may overwrite its identity where no one else can have it: where its own downsampling conv made it,
    or the fused block before it in the same chain."""
    before: Any = None
    for block in chain:
        if isinstance(block, FusedBasicBlock | FusedBottleneck) and calls.only_by(chain, block):
            own = block.downsample is not None and is_fused_chain(block.downsample)
            block.may_overwrite = own or (block.downsample is None and before is not None)
            before = block
        else:
            before = None


def _fuse_residual(residual: Any, calls: _Calls) -> None:
    """The last conv of the branch adds the shortcut and applies the activation."""
    *_, chain, drop = residual.branch
    last, activation = _conv_of(chain), _activation(residual.act)
    stock = is_stock(residual.branch, nn.Sequential, "forward") and is_stock(drop, StochasticDepth, "forward")
    if stock and last is not None and activation and calls.only_by(residual, last):
        _become_fused(last, activation)
        residual.__class__ = FusedResidual


def _fuse_pyramid(pyramid: Any, calls: _Calls) -> None:
    """Each inner conv adds the level above."""
    methods = "get_result_from_inner_blocks", "get_result_from_layer_blocks"
    convs = [_conv_of(block) for block in pyramid.inner_blocks]
    if is_stock(pyramid, FeaturePyramidNetwork, *methods) and all(convs) and calls.only_by(pyramid, *convs):
        for conv in convs:
            _become_fused(conv)
        pyramid.__class__ = FusedPyramid


_FUSERS: dict[type[nn.Module], Callable[[Any, _Calls], None]] = {
    BasicBlock: _fuse_block,
    Bottleneck: _fuse_block,
    Residual: _fuse_residual,
    FeaturePyramidNetwork: _fuse_pyramid,
    IntermediateLayerGetter: _fuse_chain,
    nn.Sequential: _fuse_chain,
    Conv2dNormActivation: _fuse_chain,
}

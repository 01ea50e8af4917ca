"""Finding the convs of a model that can take their bias, activation and residual sum with them; its norms are folded.

The modules are changed where they stand: a conv becomes a ``FusedConv``, which applies the activation in place of its
block. Parameters keep their names. What has hooks, or is of a class that is not known here, stays as it is, layer by
layer.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from retina_fast.backbones.spinenet import Residual, SpineNet
from retina_fast.backbones.spinenet_mobile import MobileSpineNet
from retina_fast.deploy.fusion.blocks import (
    FusedBasicBlock,
    FusedBottleneck,
    FusedMobileSpineNet,
    FusedPyramid,
    FusedResidual,
    FusedSpineNet,
    convs_of,
)
from retina_fast.deploy.fusion.layers import FusedConv, FusedStem
from retina_fast.deploy.fusion.tail import FusedTail
from retina_fast.kernels.conv_winograd import Scratch
from retina_fast.stock import has_hooks, is_plain_conv, is_stem_pooling, is_stock

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish"}


def count_convs(model: nn.Module) -> int:
    """How many 2-D convs the model has."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def fuse_convs(model: nn.Module, run: Callable[[], object]) -> int:
    """Fuse what can be fused, in place, and return how many convs are fused ones now.

    Args:
        model: in evaluation mode, its norms folded by :func:`retina_fast.deploy.fusion.fold.fold_batch_norm`.
        run: a forward pass of it in which every part takes part.

    Example::

        >>> import torch
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
        if any(is_stock(module, cls, "forward") for cls in (nn.Sequential, IntermediateLayerGetter)):
            _chain_blocks(module, calls)
    fused = [module for module in model.modules() if isinstance(module, FusedConv)]
    scratch = Scratch()
    for conv in fused:
        conv.scratch = scratch
    return len(fused)


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


def _is_fused_chain(chain: Any) -> bool:
    """Whether it is a chain of a fused conv and nothing else, whose output is its own."""
    if not any(is_stock(chain, cls, "forward") for cls in (nn.Sequential, Conv2dNormActivation)):
        return False
    conv, *rest = chain
    return is_stock(conv, FusedConv, "forward") and all(map(_is_identity, rest))


def _fuse_chain(chain: Any, calls: _Calls) -> None:
    """Activations that follow a conv, or a conv and its folded norm, move into the conv; so does the max pooling of a
    ResNet after its ReLU."""
    returned = getattr(chain, "return_layers", ())  # what an IntermediateLayerGetter returns of its chain
    conv: Any = None
    for name, part in list(chain._modules.items()):
        activation, taken = _activation(part), False
        if conv is not None and calls.only_by(chain, conv, part):
            if is_plain_conv(conv) and activation:
                _become_fused(conv, activation)
                taken = True
            elif is_stock(conv, FusedConv, "forward") and conv.activation == "relu" and is_stem_pooling(part):
                conv.__class__ = FusedStem
                taken = True
        if taken:
            setattr(chain, name, nn.Identity())
        elif is_plain_conv(part):
            conv = part
        elif not _is_identity(part):
            conv = None
        if name in returned:
            conv = None


def _fuse_block(block: Any, calls: _Calls) -> None:
    """The last conv adds the identity, and takes over the bias of a downsampling conv."""
    numbers = range(1, len(convs_of(block)) + 1)
    convs, norms = ([getattr(block, f"{kind}{number}") for number in numbers] for kind in ("conv", "bn"))
    if not (all(map(is_plain_conv, convs)) and all(map(_is_identity, norms)) and calls.only_by(block, *convs)):
        return
    if _activation(block.relu) != "relu":
        return
    down, last = _conv_of(block.downsample), convs[-1]
    if down is not None and calls.only_by(block, down) and down.bias is not None and last.bias is not None:
        last.bias = nn.Parameter(last.bias + down.bias, requires_grad=False)
        down.bias = None
        block.merges_downsample = calls.only_by(block, block.downsample)
        _become_fused(down)
    for conv in convs:
        _become_fused(conv, "relu")
    block.__class__ = FusedBottleneck if isinstance(block, Bottleneck) else FusedBasicBlock


def _allow_overwriting(chain: Any, calls: _Calls) -> None:
    """A fused block may overwrite its identity where no one else can have it: where its own downsampling conv made it,
    or the fused block before it in the same chain."""
    before: Any = None
    for block in chain:
        if isinstance(block, FusedBasicBlock | FusedBottleneck) and calls.only_by(chain, block):
            own = block.downsample is not None and _is_fused_chain(block.downsample)
            block.may_overwrite = own or (block.downsample is None and before is not None)
            before = block
        else:
            before = None


def _ends(part: Any, calls: _Calls) -> tuple[Any, Any]:
    """The first and the last block of a part, where that is a bottleneck, or a chain of such."""
    if is_stock(part, FusedBottleneck, "forward"):
        return part, part
    if not is_stock(part, nn.Sequential, "forward") or not len(part):
        return None, None
    first, last = part[0], part[-1]
    ends = (block if calls.only_by(part, block) else None for block in (first, last))
    first, last = (block if is_stock(block, FusedBottleneck, "forward") else None for block in ends)
    return first, last


def _chain_blocks(chain: Any, calls: _Calls) -> None:
    """Where two bottlenecks follow each other, the end of one may run with the first conv of the other."""
    before: Any = None
    for part in chain._modules.values():
        first, last = _ends(part, calls) if calls.only_by(chain, part) else (None, None)
        if before is not None and first is not None and first is not before:
            before.tail = first.before = FusedTail(before.conv2, before.conv3, first.conv1)
        before = last


def _fuse_residual(residual: Any, calls: _Calls) -> None:
    """The last conv of the branch adds the shortcut and applies the activation."""
    *_, chain, drop = residual.branch
    last, activation = _conv_of(chain), _activation(residual.act)
    stock = is_stock(residual.branch, nn.Sequential, "forward") and is_stock(drop, StochasticDepth, "forward")
    if stock and last is not None and activation and calls.only_by(residual, last):
        _become_fused(last, activation)
        residual.__class__ = FusedResidual
        residual.may_overwrite = _conv_of(residual.shortcut) is not None


def _fuse_spinenet(network: Any, calls: _Calls) -> None:
    """The second link of a row adds what the first returns."""
    if not is_stock(network, type(network), "join"):
        return
    rows = []
    for row, links in enumerate(network.links):
        stock = all(is_stock(link, nn.Sequential, "forward") for link in links)
        convs = [_conv_of(link[-1]) for link in links] if stock else [None]
        plain = network.specification[row].fusion is None
        if plain and all(conv is not None and calls.only_by(network, conv) for conv in convs):
            _become_fused(convs[1])
            rows.append(row)
    network.__class__ = FusedSpineNet if isinstance(network, SpineNet) else FusedMobileSpineNet
    network.fused_rows = frozenset(rows)


def _fuse_pyramid(pyramid: Any, calls: _Calls) -> None:
    """Each inner conv adds the level above."""
    methods = "get_result_from_inner_blocks", "get_result_from_layer_blocks"
    convs = [_conv_of(block) for block in pyramid.inner_blocks]
    if is_stock(pyramid, FeaturePyramidNetwork, *methods) and all(convs) and calls.only_by(pyramid, *convs):
        for conv in convs:
            _become_fused(conv)
        pyramid.__class__ = FusedPyramid
        pyramid.extends_last_level = is_stock(pyramid.extra_blocks, LastLevelP6P7, "forward")


_FUSERS: dict[type[nn.Module], Callable[[Any, _Calls], None]] = {
    BasicBlock: _fuse_block,
    Bottleneck: _fuse_block,
    Residual: _fuse_residual,
    SpineNet: _fuse_spinenet,
    MobileSpineNet: _fuse_spinenet,
    FeaturePyramidNetwork: _fuse_pyramid,
    IntermediateLayerGetter: _fuse_chain,
    nn.Sequential: _fuse_chain,
    Conv2dNormActivation: _fuse_chain,
}

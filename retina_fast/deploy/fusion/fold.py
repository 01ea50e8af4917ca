"""Folding BatchNorm into the convs before it: with s = weight / sqrt(var + eps), W' = s W and b' = s (b - mean) + bias.

Which norm belongs to which conv is found by running the model, not by names or order of registration. A norm is folded
if each of its inputs is the unchanged output of one conv, and if each output of that conv goes to this norm. This works
for any trunk.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import misc

from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d
from retina_fast.forward import run_convs
from retina_fast.stock import has_hooks

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, misc.FrozenBatchNorm2d, FrozenBatchNorm2d)
_LARGEST_CHANGE = 1e-3  # the allowed relative change of an output, in norm; rounding alone in float32 makes 1e-6


def count_norms(model: nn.Module) -> int:
    """How many BatchNorms, frozen ones included, the model has."""
    return sum(isinstance(module, _NORMS) for module in model.modules())


def conv_outputs(model: Any, pixels: Tensor) -> list[Tensor]:
    """All that trunk and heads give for pixels (B, C, H, W): a run of the model for :func:`fold_batch_norm`."""
    features, returned = run_convs(model, pixels)
    return [*features, *(level for output in returned.values() for level in output)]


def fold_batch_norm(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> int:
    """Fold what can be folded, in place, and return how many BatchNorms that were.

    If folding changes the model's outputs, all of it is undone: this happens if a conv's output is also used elsewhere.

    Args:
        model: in evaluation mode.
        run: a forward pass of it in which every part takes part, returning its outputs.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> with torch.no_grad():
        ...     fold_batch_norm(model, lambda: [model(torch.ones(1, 3, 8, 8))])
        1
        >>> model[1]
        Identity()
    """
    with without_tf32():
        return _fold_all(model, run)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Turns TF32 off for convs and matrix products: it alone would change an output by more than is allowed."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _fold_all(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> int:
    names = {module: name for name, module in model.named_modules()}
    pairs, before = _pairs(model, run)
    old = [(conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        _fold(conv, norm)
        model.set_submodule(names[norm], nn.Identity())
    if pairs and _change(before, run()) > _LARGEST_CHANGE:
        for (conv, norm), (weight, bias) in zip(pairs, old, strict=True):
            conv.weight, conv.bias = weight, bias
            model.set_submodule(names[norm], norm)
        return 0
    return len(pairs)


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative change of an output."""
    return max(
        float((new - old).double().norm() / old.double().norm().clamp(min=1e-12))
        for old, new in zip(before, after, strict=True)
    )


def _pairs(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> tuple[list[tuple[Any, Any]], Sequence[Tensor]]:
    """The convs and norms that belong together, and the outputs of the run that showed it."""
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # by the id of a conv's output, which is kept alive
    calls: dict[nn.Module, int] = defaultdict(int)
    fed: dict[tuple[nn.Module | None, nn.Module], int] = defaultdict(int)

    def conv_returned(conv: nn.Module, _: object, output: Tensor) -> None:
        calls[conv] += 1
        made[id(output)] = conv, output, output._version

    def norm_called(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        calls[norm] += 1
        conv, output, version = made.get(id(inputs[0]), (None, inputs[0], 0))
        fed[conv if output._version == version else None, norm] += 1

    parts = [module for module in model.modules() if not has_hooks(module)]
    convs = [module for module in parts if type(module) is nn.Conv2d]
    norms = [module for module in parts if type(module) in _NORMS and module.running_mean is not None]
    handles = [conv.register_forward_hook(conv_returned) for conv in convs]
    handles += [norm.register_forward_pre_hook(norm_called) for norm in norms]
    try:
        outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(conv, norm) for (conv, norm), times in fed.items() if conv and times == calls[conv] == calls[norm]]
    return pairs, outputs


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    start = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    scale = weight / (var + norm.eps).sqrt()
    dtype = conv.weight.dtype
    with torch.no_grad():
        conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(dtype), requires_grad=False)
        conv.bias = nn.Parameter(((start - mean) * scale + bias).to(dtype), requires_grad=False)

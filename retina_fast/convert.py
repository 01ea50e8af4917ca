"""Turning a live torchvision RetinaNet, or a subclass of it, into a fast one that shares its parameters; and back."""

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from retina_fast.backbones.frozen_norm import as_torchvision
from retina_fast.device import lay_out
from retina_fast.model import RetinaNet


@functools.cache
def _fast_class(cls: Any) -> type[RetinaNet]:
    """A class with the bases ``cls`` and this package's RetinaNet, in this order, so that overrides of ``cls`` win."""
    if cls is TorchvisionRetinaNet:
        return RetinaNet
    members = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, protocol: (_new_fast, (cls,), self.__getstate__()),
    }
    return type(f"Fast{cls.__name__}", (cls, RetinaNet), members)


def _new_fast(cls: Any) -> RetinaNet:
    fast = _fast_class(cls)
    return fast.__new__(fast)


def from_torchvision(model: TorchvisionRetinaNet) -> RetinaNet:
    """A live torchvision RetinaNet, or a subclass of it, turned fast; parameters, buffers and parts are shared.

    Args:
        model: it is left as it is, but for the memory format of weights on a GPU, which becomes channels_last. What
            its class overrides (``forward``, ``compute_loss``, state_dict hooks, ...) keeps running.

    Raises:
        TypeError: for anything but a torchvision RetinaNet.

    Example::

        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> slow = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        >>> fast = from_torchvision(slow)
        >>> fast.head.classification_head.cls_logits.weight is slow.head.classification_head.cls_logits.weight
        True
    """
    if isinstance(model, RetinaNet):
        return model
    if not isinstance(model, TorchvisionRetinaNet):
        raise TypeError(f"model must be a torchvision RetinaNet, got {type(model).__module__}.{type(model).__name__}")
    fast = _new_fast(type(model))
    for name, value in vars(model).items():
        fast.__dict__[name] = value.copy() if isinstance(value, dict) else value
    _rebind_hooks(fast, model)
    lay_out(fast)
    return fast


def copied(model: nn.Module) -> Any:
    """A deep copy of a model that may have been run. Pruning and the older ``weight_norm`` leave in their modules the
    weight that they last computed, which ``copy.deepcopy`` alone refuses to copy.

    Example::

        >>> from torch.nn.utils.prune import l1_unstructured
        >>> conv = l1_unstructured(nn.Conv2d(3, 4, 1), "weight", 0.5)
        >>> copied(conv).weight.equal(conv.weight)
        True
    """
    held = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def to_torchvision(model: RetinaNet) -> TorchvisionRetinaNet:
    """A copy of the model that is torchvision's own: the same weights, parts and settings, run by torchvision's code.

    Warns:
        UserWarning: if the model's classification loss is not torchvision's, by which the copy would be trained.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> type(to_torchvision(retinanet_resnet18_fpn(weights_backbone=None))) is TorchvisionRetinaNet
        True
    """
    if model.classification_loss != "focal" or model.focal_gamma != 2:
        given = f"classification_loss {model.classification_loss!r} and focal_gamma {model.focal_gamma}"
        warnings.warn(f"torchvision's model has no {given}: it would train by its focal loss", stacklevel=2)
    return torchvision_detector(model)


def torchvision_detector(model: RetinaNet) -> TorchvisionRetinaNet:
    """The same for detection alone, which the losses do not matter to.

    Example::

        >>> from retina_fast import retinanet_resnet18_fpn
        >>> type(torchvision_detector(retinanet_resnet18_fpn(weights_backbone=None))) is TorchvisionRetinaNet
        True
    """
    twin = copied(model)
    twin.__class__ = TorchvisionRetinaNet
    as_torchvision(twin)
    return twin.to(memory_format=torch.contiguous_format)


def _rebind_hooks(fast: RetinaNet, model: TorchvisionRetinaNet) -> None:
    """Point the hooks that hold ``model`` (weakly, or as bound methods) at ``fast``."""
    for name, value in vars(fast).items():
        if not name.endswith("_hooks") or not isinstance(value, dict):
            continue
        for key, hook in value.items():
            if getattr(hook, "with_module", False):
                value[key] = type(hook)(hook.hook, fast)
            elif getattr(hook, "__self__", None) is model:
                value[key] = hook.__func__.__get__(fast)

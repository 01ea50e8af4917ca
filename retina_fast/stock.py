"""Whether a part of a model is torchvision's own, so that the fast path may stand in for it.

A user may replace or override any part; then their code runs. A part is stock while its class is torchvision's, none of
the named methods is overridden, on the class or on the object, and no hook waits for it to be called.
"""

from torch import nn


def is_stock(part: object, cls: type, *methods: str) -> bool:
    """Whether ``part`` is a plain ``cls`` whose ``methods`` are its own and which has no forward hooks.

    Example::

        >>> is_stock(nn.ReLU(), nn.ReLU, "forward"), is_stock(nn.ReLU6(), nn.ReLU, "forward")
        (True, False)
    """
    if type(part) is not cls or any(name in vars(part) for name in methods):
        return False
    return not isinstance(part, nn.Module) or not has_hooks(part)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run forward or backward hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def overrides(model: nn.Module, base: type, method: str) -> bool:
    """Whether ``model``, by its class or by an attribute of its own, has another ``method`` than ``base``."""
    return method in vars(model) or getattr(type(model), method) is not getattr(base, method)

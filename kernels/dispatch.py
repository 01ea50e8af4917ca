"""Triton, or a stand-in on systems that have none (macOS, Windows), under which the kernel files still import.

Every public operation asks ``runs_triton`` whether its kernels or its PyTorch reference should run.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn else (lambda fn: fn))
    tl = SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = SimpleNamespace()
    HAS_TRITON = False


@triton.jit
def _probe():
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1: kernels run on CPU tensors
PTX = HAS_TRITON and not INTERPRETED and torch.version.hip is None  # inline PTX needs NVIDIA's compiler


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func, forward-mode AD or ``is_grads_batched`` traces one of the tensors. They need plain PyTorch
    operations: through a kernel they would get a derivative of zero, or none."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if x is not None]
    functorch = torch._C._functorch
    if any(functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x) for x in given):
        return True
    return any(unpack_dual(x).tangent is not None for x in given)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for derivatives with respect to one of the tensors, forward or backward."""
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return recorded or is_transformed(*tensors)


def needs_reference(*grads: Tensor | None) -> bool:
    """Whether a backward pass is asked for what finished gradients cannot give: derivatives of them, or several of them
    at once, by ``create_graph=True`` or ``is_grads_batched=True``."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed(*grads))


_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation runs its kernels on these floating-point tensors.

    It does if Triton is installed, the tensors are on a GPU in a dtype that the kernels read, and torch.func does not
    trace them. Float64 is left to the references. None stands for an optional argument that was not given.
    """
    served = HAS_TRITON and all(x is None or (x.is_cuda and x.dtype in _SERVED) for x in tensors)
    return served and not is_transformed(*tensors)

"""Triton, or a stand-in on systems that have none (macOS, Windows), under which the kernel files still import.

Every public operation asks ``runs_triton`` which path it takes, after it has checked and converted its arguments.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn else (lambda fn: fn))
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False


@triton.jit
def _probe():
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1: kernels run on CPU tensors
PTX = HAS_TRITON and not INTERPRETED and torch.version.hip is None  # inline PTX needs NVIDIA's compiler

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation runs its kernels on these floating-point tensors: Triton is installed, and they lie on a GPU
    in a dtype that the kernels read. Float64 is left to the references. None stands for an argument not given."""
    return HAS_TRITON and all(x is None or (x.is_cuda and x.dtype in _SERVED) for x in tensors)

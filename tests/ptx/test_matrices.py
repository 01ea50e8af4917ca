"""Products of matrices as compiled for two GPUs, against exact ones: mma on sm_80, wgmma on sm_90."""

import pytest
import torch

from retina_fast.kernels.dispatch import tl, triton
from tests.ptx.launch import Launch, emulated


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, stride_k, stride_n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c (M, N) = a (M, K) b (K, N), added to what c holds."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * stride_k + n[None, :] * stride_n)
    c_ptr += m[:, None] * N + n[None, :]
    tl.store(c_ptr, tl.dot(a, b, tl.load(c_ptr)))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("n", "k", "dtype", "k_runs_fastest"),
    [
        (64, 32, torch.bfloat16, False),
        (16, 128, torch.float16, True),
        (128, 64, torch.float16, False),
        (32, 16, torch.bfloat16, True),
    ],
)
def test_a_product(n, k, dtype, k_runs_fastest, capability):
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((128, k), (k, n)))
    if k_runs_fastest:
        b = b.t().contiguous().t()
    c = torch.randn(128, n, generator=generator)
    exact = c.double() + a.double() @ b.double()
    launches: list[Launch] = []
    with emulated(capability, before=launches.append):
        _product_kernel[(1,)](a, b, c, *b.stride(), M=128, N=n, K=k, num_warps=8)
    torch.testing.assert_close(c.double(), exact, rtol=1e-6, atol=1e-5)
    assert ("wgmma" in launches[0].ptx) == (capability == 90)

"""What follows a conv in one pass: the kernel against its definition."""

import pytest
import torch

from retina_fast.kernels.conv_epilogue import _conv_epilogue_triton, conv_epilogue_, conv_epilogue_reference


@pytest.mark.parametrize("activation", ["none", "relu", "swish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "with_bias", "with_z"), [(64, True, True), (36, True, False), (819, False, True)])
def test_the_kernel_gives_its_definition(channels, with_bias, with_z, dtype, activation, device):
    generator = torch.Generator().manual_seed(channels)

    def random(*shape):
        return (2 * torch.randn(*shape, generator=generator)).to(device, dtype)

    y = random(2, channels, 5, 7).contiguous(memory_format=torch.channels_last)
    y[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    bias, z = random(channels) if with_bias else None, random(2, channels, 5, 7) if with_z else None
    expected = conv_epilogue_reference(y, bias, z, activation)
    given = y.clone(memory_format=torch.preserve_format)
    out = _conv_epilogue_triton(y, bias, z, activation)
    assert out is y
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        conv_epilogue_(given, bias, z, activation), expected, rtol=tolerance, atol=1e-6, equal_nan=True
    )


def test_what_does_not_fit_is_named():
    y = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"y must be \(B, C, H, W\) in channels_last memory, got \(1, 4, 3, 3\)"):
        conv_epilogue_(torch.zeros(1, 4, 3, 3), None, None, "relu")
    with pytest.raises(ValueError, match=r"bias must be \(4,\), got \(3,\)"):
        conv_epilogue_(y, torch.zeros(3), None, "relu")
    with pytest.raises(ValueError, match=r"z must be \(1, 4, 3, 3\), got \(1, 4, 3, 2\)"):
        conv_epilogue_(y, None, torch.zeros(1, 4, 3, 2), "relu")
    with pytest.raises(ValueError, match="activation must be one of none, relu, swish, got 'gelu'"):
        conv_epilogue_(y, None, None, "gelu")

"""The first conv of a ResNet: the kernel against its definition."""

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import stem_conv as module
from retina_fast.kernels.stem_conv import serves_stem, stem_conv, stem_conv_reference
from tests.ptx.cases import CASES, OTHER_ORDERS, check, names, run_case

DTYPES = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # whose products the interpreter gets wrong


def case(shape=(2, 3, 20, 30), channels=64, dtype=torch.float16, device="cpu"):
    """Images of this shape in channels_last memory, and weights."""
    generator = torch.Generator().manual_seed(channels)
    x, weight = torch.randn(shape, generator=generator), torch.randn(channels, 3, 7, 7, generator=generator) / 12
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last), weight.to(device, dtype)


# Matches the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channels"), [((2, 3, 20, 32), 64), ((1, 3, 17, 33), 24), ((3, 3, 1, 1), 1), ((1, 3, 9, 8), 100)], ids=str
)
def test_the_kernel_gives_its_definition(shape, channels, dtype, device):
    x, weight = case(shape, channels, dtype, device)
    exact = stem_conv_reference(x.double(), weight.double())
    for ours in (
        module._op(x, weight),
        stem_conv(x, weight),
        stem_conv(x, weight.clone(memory_format=torch.channels_last)),
    ):
        assert ours.shape == exact.shape
        error = (ours.double() - exact).norm() / exact.norm()
        assert error <= {torch.float16: 2**-12, torch.bfloat16: 2**-9}[dtype]


def test_gradients():
    """Where one may be asked for, PyTorch's conv runs."""
    inputs = [tensor.double().requires_grad_() for tensor in case((1, 3, 4, 5), 2)]
    assert torch.autograd.gradcheck(stem_conv, inputs)
    assert not serves_stem(*(tensor.requires_grad_() for tensor in case()))


# Edges


def test_what_the_kernel_does_not_take(device):
    x, weight = case(device=device)
    expected = F.conv2d(x.double(), weight.double(), stride=2, padding=3)
    torch.testing.assert_close(stem_conv(x.contiguous(), weight).double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stem_conv(x.float(), weight.float()).double(), expected, rtol=2e-3, atol=2e-3)
    assert stem_conv(x[:0], weight).shape == (0, 64, 10, 15)


def test_older_gpus_run_pytorchs_conv(monkeypatch):
    x, weight = (tensor.to("meta") for tensor in case())
    monkeypatch.setattr(module, "runs_triton", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, served in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, own=capability: own)
        assert serves_stem(x, weight) == served


def test_what_does_not_fit_is_named():
    x, weight = case()
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\) with at least one pixel, got \(2, 4, 3, 3\)"):
        stem_conv(torch.zeros(2, 4, 3, 3), weight)
    with pytest.raises(ValueError, match=r"weight must be \(C_out, 3, 7, 7\) = \(64, 3, 7, 7\), got \(64, 3, 5, 5\)"):
        stem_conv(x, weight[..., 1:-1, 1:-1])
    with pytest.raises(ValueError, match=r"weight must be torch.float16 as x is, got torch.float32"):
        stem_conv(x, weight.float())
    with pytest.raises(ValueError, match="weight must be on cpu as the other arguments are, got meta"):
        stem_conv(x, weight.to("meta"))


# Registration


def test_opcheck_and_compiles_whole(device):
    x, weight = case((1, 3, 4, 6), 16, device=device)
    torch.library.opcheck(module._op, (x, weight))
    compiled = torch.compile(stem_conv, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, weight), stem_conv_reference(x, weight), rtol=2e-3, atol=2e-3)


# As compiled code


@pytest.mark.parametrize("name", names("stem_conv"))
def test_compiled(name):
    check(name)


def test_a_copy_that_is_not_waited_for_is_seen():
    """Windows are copied into shared memory while the program goes on."""
    outcome = run_case(CASES["stem_conv bf16 C=64"], edit=lambda ptx: ptx.replace("cp.async.wait_group", "// "))
    assert outcome.failures


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("stem_conv"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

"""A conv with its sum and ReLU: every way to compute it against float64 autograd of the definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from retina_fast.kernels import conv_onednn
from retina_fast.kernels import fused_conv as module
from retina_fast.kernels.conv_epilogue import epilogue_gradients
from retina_fast.kernels.conv_onednn import onednn_conv, pack_weight, serves_dtype
from retina_fast.kernels.fused_conv import fused_conv, fused_conv_reference
from tests.instruments.fake_gpu import TorchOp, gpu_work_of

GEOMETRIES: dict[str, Any] = {  # kernel, stride, padding, dilation, groups
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided": ((3, 1), (2, 1), (1, 2), (1, 1), 1),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2), 1),
    "grouped": ((3, 3), (1, 1), (1, 1), (1, 1), 4),
}
WAYS = ("op", "public", "packed", "overwriting")

needs_onednn = pytest.mark.skipif(not serves_dtype(torch.float32), reason="this build has no fused oneDNN convs")


def case(name, dtype=torch.float32, device="cpu", last=True, with_bias=True):
    """x (2, 16, 11, 7), weight, bias, z and the incoming gradient, and the conv's geometry."""
    kernel, *geometry = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        values = torch.randn(*shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=layout).requires_grad_()

    x, weight = random(2, 16, 11, 7), random(12, 16 // geometry[-1], *kernel)
    shape = F.conv2d(x, weight, None, *geometry).shape
    return [x, weight, random(12) if with_bias else None, random(*shape)], random(*shape).detach(), geometry


def error(ours, exact):
    ours = ours.detach().cpu().double()
    return float((ours - exact.detach()).norm() / exact.detach().norm())


def exact(tensors, incoming, geometry, with_z):
    """The output and the gradients in float64."""
    doubles: list[Any] = [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    x, weight, bias, z = doubles
    y = F.conv2d(x, weight, bias, *geometry)
    y = F.relu(y + z if with_z else y)
    wanted = [t for t in (x, weight, bias, z if with_z else None) if t is not None]
    return y, torch.autograd.grad(y, wanted, incoming.cpu().double())


def reference(tensors, geometry, with_z):
    x, weight, bias, z = tensors
    return fused_conv_reference(x, weight, bias, z if with_z else None, True, *geometry)


def run(way, tensors, geometry, with_z):
    x, weight, bias, z = tensors
    if way in ("packed", "overwriting"):
        x, z = x.detach(), z.detach().clone()
        bias = None if bias is None else bias.detach()
        packed, overwrite = pack_weight(weight, x.shape, *geometry), way == "overwriting"
        y = onednn_conv(x, packed, bias, z if with_z else None, "relu", *geometry, overwrite_z=overwrite)
        assert (y.data_ptr() == z.data_ptr()) == (overwrite and with_z)
        return y
    if way == "op":
        return module._op(x, weight, bias, z if with_z else None, True, *map(list, geometry[:3]), geometry[3])
    return fused_conv(x, weight, bias, z if with_z else None, True, *geometry)


# Matches the reference


@needs_onednn
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_float32_is_within_1e_5_of_float64(name, way, with_z):
    tensors, incoming, geometry = case(name)
    with torch.no_grad():
        ours = run(way, tensors, geometry, with_z)
    theirs, _ = exact(tensors, incoming, geometry, with_z)
    assert 0 < (theirs == 0).double().mean() < 1
    assert error(ours, theirs) < 1e-5
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not serves_dtype(torch.bfloat16), reason="this processor has no bfloat16")
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_no_further_from_float64_than_eager(way, with_z):
    tensors, incoming, geometry = case("3x3", torch.bfloat16)
    x, weight, bias, z = tensors
    theirs, _ = exact(tensors, incoming, geometry, with_z)
    with torch.no_grad():
        ours = run(way, tensors, geometry, with_z)
        eager = F.relu(F.conv2d(x, weight, bias, *geometry) + (z if with_z else 0))
    assert ours.dtype == torch.bfloat16
    # The operation rounds the conv before it adds bias and sum, as PyTorch does on a GPU.
    assert error(ours, theirs) <= (1.6 if way == "op" else 1.1) * error(eager, theirs)


@pytest.mark.parametrize("way", ["op", "public"])
@pytest.mark.parametrize("last", [False, True])
def test_memory_format_and_no_bias(way, last):
    tensors, incoming, geometry = case("strided", last=last, with_bias=False)
    with torch.no_grad():
        ours = run(way, tensors, geometry, with_z=True)
    assert error(ours, exact(tensors, incoming, geometry, True)[0]) < 1e-5
    assert ours.is_contiguous(memory_format=torch.channels_last if last or way == "op" else torch.contiguous_format)


@needs_onednn
def test_swish_by_onednn():
    tensors, _, geometry = case("3x3")
    x, weight, bias, _ = (t.detach() for t in tensors)
    ours = onednn_conv(x, weight, bias, None, "swish", *geometry)
    assert error(ours, F.silu(F.conv2d(x.double(), weight.double(), bias.double(), *geometry))) < 1e-5


@needs_onednn
def test_packed_weights_take_other_shapes():
    tensors, _, geometry = case("1x1")
    _, weight, bias, _ = (t.detach() for t in tensors)
    packed = pack_weight(weight, (2, 16, 11, 7), *geometry)
    for shape in ((1, 16, 1, 1), (5, 16, 40, 3), (0, 16, 4, 4)):
        x = torch.randn(shape)
        for z in (None, torch.randn(len(x), len(weight), *shape[2:])):  # PyTorch 2.11 adds nothing to a single pixel
            expected = fused_conv_reference(x, weight, bias, z, True, *geometry)
            torch.testing.assert_close(onednn_conv(x, packed, bias, z, "relu", *geometry), expected)


# Gradients


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("way", ["op", "public"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients(name, way, with_z, device):
    tensors, incoming, geometry = case(name, device=device)
    _, expected = exact(tensors, incoming, geometry, with_z)
    ours = torch.autograd.grad(run(way, tensors, geometry, with_z), tensors[: 3 + with_z], incoming)
    for found, theirs in zip(ours, expected, strict=True):
        assert error(found, theirs) < 1e-5


@pytest.mark.parametrize("way", ["op", "public"])
def test_a_sum_of_another_size_is_resized(way, device):
    (x, weight, bias, _), incoming, geometry = case("1x1", device=device)
    z = torch.randn(2, 12, 6, 4, device=device).requires_grad_()
    doubles: list[Any] = [t.detach().double().requires_grad_() for t in (x, weight, bias, z)]
    resized = F.interpolate(doubles[3], size=(11, 7), mode="nearest")
    theirs = F.relu(F.conv2d(*doubles[:3], *geometry) + resized)
    ours = run(way, (x, weight, bias, z), geometry, True)
    assert error(ours, theirs.cpu()) < 1e-5
    gradients = torch.autograd.grad(ours, (x, weight, bias, z), incoming)
    for found, right in zip(gradients, torch.autograd.grad(theirs, doubles, incoming.double()), strict=True):
        assert error(found, right.cpu()) < 1e-5


def test_the_op_saves_no_tensor_of_the_outputs_size_but_the_output(device):
    tensors, _, geometry = case("3x3", device=device)
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run("op", tensors, geometry, with_z=True)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (*tensors[:2], y))


def test_a_frozen_weight_gets_no_gradient(device):
    tensors, incoming, geometry = case("3x3", device=device, with_bias=False)
    tensors[1].requires_grad_(False)
    run("op", tensors, geometry, with_z=False).backward(incoming)
    assert tensors[0].grad is not None
    assert tensors[1].grad is None


def test_second_derivatives(device):
    tensors, _, geometry = case("3x3", device=device)
    penalties = []
    for function in (
        lambda: run("op", tensors, geometry, True),
        lambda: reference(tensors, geometry, True),
    ):
        grads = torch.autograd.grad(function().square().sum(), tensors, create_graph=True)
        penalties.append(torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), tensors))
    for ours, theirs in zip(*penalties, strict=True):
        assert error(ours, theirs.cpu().double()) < 1e-4


def test_nan_survives_where_gradients_are_asked_for():
    tensors, _, geometry = case("3x3")
    with torch.no_grad():
        tensors[0][0, 0, 0, 0] = torch.nan
    assert run("public", tensors, geometry, with_z=False).isnan().any()


# Arguments


def test_autocast():
    tensors, _, geometry = case("3x3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run("public", tensors, geometry, with_z=True)
        expected = reference(tensors, geometry, False)
    assert ours.dtype == expected.dtype == torch.bfloat16


def test_a_build_without_onednn_runs_eagerly(monkeypatch):
    monkeypatch.setattr(conv_onednn, "_NAMES", ("_of_no_build",))
    serves_dtype.cache_clear()
    tensors, _, geometry = case("3x3")
    with torch.no_grad():
        ours = run("public", tensors, geometry, with_z=True)
    assert torch.equal(ours, reference(tensors, geometry, True))
    assert not serves_dtype(torch.float32)
    serves_dtype.cache_clear()


def test_another_default_device_does_not_turn_onednn_off():
    expected = serves_dtype(torch.float32)
    serves_dtype.cache_clear()
    with torch.device("meta"):
        found = serves_dtype(torch.float32)
    serves_dtype.cache_clear()
    assert found == expected


def test_arguments_that_do_not_fit_are_named():
    (x, weight, bias, z), _, geometry = case("3x3")
    for arguments, message in (
        ((x, weight[:, 1:], bias, z), r"weight \(12, 15, 3, 3\) in 1 groups does not fit x \(2, 16, 11, 7\)"),
        ((x, weight, bias[1:], z), r"bias must be \(C_out,\) = \(12,\), got \(11,\)"),
        ((x, weight, bias, z[:1]), r"z must be \(B, C_out, H_z, W_z\) = \(2, 12, 11, 7\)"),
        ((x, weight, bias, z.double()), r"z must be torch\.float32 as x is, got torch\.float64"),
        ((x, weight, bias.to("meta"), z), "bias must be on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_conv(*arguments, True, *geometry)


# Registration


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("with_z", [False, True])
def test_opcheck(with_z, last, device):
    (x, weight, bias, z), _, geometry = case("grouped", device=device, last=last)
    arguments = x, weight, bias, z if with_z else None, True, *map(list, geometry[:3]), geometry[3]
    torch.library.opcheck(module._op, arguments)


def test_compiles_in_one_graph(device):
    tensors, incoming, geometry = case("strided", device=device)
    compiled = torch.compile(lambda *t: run("public", t, geometry, True), fullgraph=True, backend="aot_eager")
    ours, theirs = (
        torch.autograd.grad(y, tensors, incoming) for y in (compiled(*tensors), run("public", tensors, geometry, True))
    )
    torch.testing.assert_close(ours, theirs)


def test_on_a_gpu_it_is_a_conv_and_one_pass():
    """Recorded on fake CUDA tensors, with all that torch would launch beside it; backward as well."""

    def prepare():
        (x, weight, bias, z), incoming, geometry = case("3x3")
        return [t.detach().cuda() for t in (x, weight, bias, z, incoming)], geometry

    def call(prepared):
        (x, weight, bias, z, incoming), geometry = prepared
        y = fused_conv(x, weight, bias, z, True, *geometry)
        epilogue_gradients(incoming, y, True)

    recorded = gpu_work_of(call, prepare)
    names = [step.name if isinstance(step, TorchOp) else step.kernel.__name__ for step in recorded]
    assert names == ["convolution", "_conv_epilogue_kernel", "_epilogue_gradients_kernel", "_add_sums_kernel"]

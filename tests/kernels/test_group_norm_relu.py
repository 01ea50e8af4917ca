"""GroupNorm and ReLU of a head's levels: the kernels against float64 autograd of the definition."""

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNetHead

from retina_fast.heads import run_tower
from retina_fast.kernels import group_norm_relu as module
from retina_fast.kernels.group_norm_relu import _group_norm_relu_triton, group_norm_relu, group_norm_relu_reference
from tests.kernels.twice import assert_differentiable_twice
from tests.ptx.cases import OTHER_ORDERS, check, names
from tests.ptx.launch import emulated


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a level, and several rounds of combining them."""
    monkeypatch.setattr(module, "_TILE", 128)
    monkeypatch.setattr(module, "_SUMS", 8)


def case(channels, device="cpu", dtype=torch.float32, shapes=((7, 5), (3, 2), (1, 3)), shift=1.0):
    """Levels (2, C, H, W) in channels_last memory, weight and bias (C,), and incoming gradients."""
    generator = torch.Generator().manual_seed(channels)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def placed(values):
        return values.to(device, dtype).to(memory_format=torch.channels_last)

    levels = [placed(random(2, channels, h, w) * 2 + shift).requires_grad_() for h, w in shapes]
    weight, bias = ((1 + 0.5 * random(channels)).to(device).requires_grad_() for _ in range(2))
    return levels, weight, bias, [placed(random(*level.shape)) for level in levels]


def outputs_and_grads(function, inputs, num_groups):
    levels, weight, bias, incoming = inputs
    outputs = function(levels, weight, bias, num_groups)
    return outputs, torch.autograd.grad(outputs, [*levels, weight, bias], incoming)


def exact(inputs, num_groups):
    levels, weight, bias, incoming = inputs
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in (*levels, weight, bias)]
    incoming = [grad.cpu().double() for grad in incoming]
    return outputs_and_grads(group_norm_relu_reference, (doubles[:-2], *doubles[-2:], incoming), num_groups)


def error(ours, theirs):
    ours = ours.detach().cpu().double()
    return ((ours - theirs).norm() / theirs.norm()).item()


# Matches the reference, and gradients


@pytest.mark.parametrize(("channels", "num_groups"), [(64, 16), (12, 3), (7, 7), (5, 1)])
def test_float32_is_within_1e_5_of_float64(channels, num_groups, device):
    inputs = case(channels, device)
    outputs, grads = outputs_and_grads(_group_norm_relu_triton, inputs, num_groups)
    expected, expected_grads = exact(inputs, num_groups)
    for ours, theirs in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("num_groups", [32, 1, pytest.param(256, marks=pytest.mark.slow)])
def test_the_real_tile_sizes(num_groups, device, monkeypatch):
    monkeypatch.undo()
    inputs = case(256, device, shapes=((9, 8), (2, 1)))
    outputs, grads = outputs_and_grads(_group_norm_relu_triton, inputs, num_groups)
    expected, expected_grads = exact(inputs, num_groups)
    for ours, theirs in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_eager_error(dtype, device):
    inputs = case(12, device, dtype)
    expected, expected_grads = exact(inputs, 3)
    ours = outputs_and_grads(_group_norm_relu_triton, inputs, 3)

    def eager(levels, weight, bias, num_groups):
        return group_norm_relu_reference(levels, weight.to(dtype), bias.to(dtype), num_groups)

    theirs = outputs_and_grads(eager, inputs, 3)
    rounding = 2.0 ** {torch.bfloat16: -8, torch.float16: -11}[dtype]
    for a, b, c in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), (*expected, *expected_grads), strict=True):
        assert error(a, c) <= 2 * error(b, c) + rounding
    assert [level.dtype for level in ours[0]] == [dtype] * 3
    assert ours[1][-1].dtype == torch.float32


def assert_right_far_from_zero(device):
    """The error is that of a mean rounded to float32, which no approximate division or sum of large numbers adds to."""
    levels, weight, bias, _ = case(12, device, shift=3000.0)
    *outputs, _ = torch.ops.retina_fast.group_norm_relu(levels, weight, bias, 3, 1e-5)
    for ours, level in zip(outputs, levels, strict=True):
        x, w, b = (tensor.detach().cpu().double() for tensor in (level, weight, bias))
        groups = x.reshape(2, 3, -1)
        mean, scale = groups.mean(2, keepdim=True), (groups.var(2, keepdim=True, correction=0) + 1e-5).rsqrt()
        expected, rounded = (
            (((groups - m) * scale).reshape(x.shape) * w[:, None, None] + b[:, None, None]).relu()
            for m in (mean, mean.float().double())
        )
        assert 1e-5 < error(rounded, expected) < 3e-5
        assert error(ours, expected) < 3 * error(rounded, expected)


def test_a_mean_far_from_zero(device):
    assert_right_far_from_zero(device)


def test_the_same_input_gives_the_same_bits(device):
    inputs = case(12, device)
    first, second = (outputs_and_grads(_group_norm_relu_triton, inputs, 3) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


# Edges


def test_memory_stays_channels_last_and_nchw_is_taken(device):
    levels, weight, bias, incoming = case(12, device)
    expected = _group_norm_relu_triton(levels, weight, bias, 3)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in expected)
    nchw = [level.detach().contiguous().requires_grad_() for level in levels]
    outputs = _group_norm_relu_triton(nchw, weight, bias, 3)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(outputs, nchw, [grad.contiguous() for grad in incoming])
    torch.testing.assert_close(grads, torch.autograd.grad(expected, levels, incoming), rtol=0, atol=0)


def test_one_level_and_a_level_without_gradient(device):
    levels, weight, bias, incoming = case(12, device)
    (output,) = _group_norm_relu_triton(levels[:1], weight, bias, 3)
    assert error(output, exact(([levels[0]], weight, bias, incoming[:1]), 3)[0][0]) < 1e-5
    outputs = _group_norm_relu_triton(levels, weight, bias, 3)
    grads = torch.autograd.grad(outputs[0], [*levels, weight], incoming[0], allow_unused=True)
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in (levels[0], weight, bias)]
    (alone,) = group_norm_relu_reference(doubles[:1], doubles[1], doubles[2], 3)
    expected = torch.autograd.grad(alone, doubles[:2], incoming[0].cpu().double())
    assert error(grads[0], expected[0]) < 1e-5
    assert error(grads[-1], expected[1]) < 1e-5
    assert all((grad == 0).all() for grad in grads[1:3])


def test_constant_values_and_nan(device):
    levels, weight, bias, _ = case(12, device)
    constant = torch.full_like(levels[0], 3.0)
    (output,) = _group_norm_relu_triton([constant], weight, bias, 3)
    torch.testing.assert_close(output, bias.detach().relu()[None, :, None, None].expand_as(output), atol=1e-5, rtol=0)
    constant[0, 0, 0, 0] = torch.nan
    (output,) = _group_norm_relu_triton([constant], weight, bias, 3)
    assert output[0, :4].isnan().all()  # the group
    assert not output[0, 4:].isnan().any()
    assert not output[1].isnan().any()


def test_second_derivatives(device):
    levels, weight, bias, _ = case(12, device)
    functions = _group_norm_relu_triton, group_norm_relu_reference
    losses = [lambda f=f: sum(y.square().sum() for y in f(levels, weight, bias, 3)) for f in functions]
    assert_differentiable_twice("group_norm_relu", losses, [*levels, weight, bias], 1e-3)


def test_arguments_that_do_not_fit_are_named():
    levels, weight, bias, _ = case(12)
    with pytest.raises(ValueError, match="num_groups must divide the 12 channels, got 5"):
        group_norm_relu(levels, weight, bias, 5)
    with pytest.raises(ValueError, match=r"weight \(11,\) and bias \(12,\) do not fit levels"):
        group_norm_relu(levels, weight[1:], bias, 3)


# Registration


def test_opcheck(device):
    levels, weight, bias, _ = case(4, device, shapes=((3, 2), (1, 1)))
    torch.library.opcheck(module._forward_op, (levels, weight, bias, 2, 1e-5))
    levels = [level.detach() for level in levels]
    stats = torch.rand(2, 2, 2, 2, device=device)
    torch.library.opcheck(module._backward_op, (levels, levels, weight.detach(), bias.detach(), stats))


def test_compiles_in_one_graph(device):
    inputs = case(4, device, shapes=((3, 2), (1, 1)))
    compiled = torch.compile(_group_norm_relu_triton, fullgraph=True, backend="aot_eager")
    ours, theirs = (outputs_and_grads(function, inputs, 2) for function in (compiled, _group_norm_relu_triton))
    torch.testing.assert_close(ours, theirs)


# In the heads


def v2_head():
    torch.manual_seed(0)
    head = RetinaNetHead(16, 3, 5, lambda channels: torch.nn.GroupNorm(4, channels))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.classification_head.conv


def test_a_tower_with_the_kernel_equals_torch(device):
    tower = v2_head().to(device)
    levels = [torch.randn(2, 16, n, n, device=device, requires_grad=True) for n in (5, 3)]
    calls: list[int] = []
    tower[1][0].register_forward_hook(lambda *_: calls.append(1))
    ours = run_tower(tower, levels, norm=_group_norm_relu_triton)
    assert len(calls) == 2
    expected = [tower(level) for level in levels]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    parameters = [*levels, *tower.parameters()]
    gradients = [torch.autograd.grad([level.square().sum() for level in out], parameters) for out in (ours, expected)]
    for ours_grad, expected_grad in zip(*gradients, strict=True):
        assert error(ours_grad, expected_grad.cpu().double()) < 1e-4


def test_parts_of_the_users_own_keep_running(device):
    """A hook on a norm, another activation, or another block: the tower is run as it is."""
    calls: list[int] = []

    def must_not_run(*_):
        raise AssertionError

    levels = [torch.randn(1, 16, 3, 3, device=device)]
    for change in ("hook", "activation", "block", "tower hook"):
        tower = v2_head().to(device)
        if change == "hook":
            tower[0][1].register_forward_hook(lambda *_: calls.append(1))
        elif change == "tower hook":
            tower.register_forward_hook(lambda *_: calls.append(1))
        elif change == "activation":
            tower[2][2] = torch.nn.SiLU()
        else:
            tower[3] = torch.nn.Conv2d(16, 16, 1, device=device)
        (output,) = run_tower(tower, levels, norm=must_not_run)
        torch.testing.assert_close(output, tower(levels[0]))
    assert len(calls) == 4


# As compiled code


@pytest.mark.parametrize("name", names("group_norm_relu"))
def test_compiled(name):
    check(name)


def test_compiled_with_a_mean_far_from_zero():
    with emulated(perturb=1):
        assert_right_far_from_zero("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("group_norm_relu"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

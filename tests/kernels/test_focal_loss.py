"""The focal loss of integer labels: the kernels, and the tiled CPU path, against float64 autograd of the definition."""

import subprocess
import sys

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from retina_fast.kernels import fast_math, one_pass
from retina_fast.kernels import focal_loss as module
from retina_fast.kernels.compiler import INTERPRETED, tl, triton
from retina_fast.kernels.focal_loss import _focal_loss_triton, focal_loss, focal_loss_reference
from retina_fast.kernels.levels import flatten_all
from retina_fast.kernels.sizes import codes
from tests.ptx.cases import OTHER_ORDERS, check, names


def kernel_loss(logits, labels, normalizers, num_classes, alpha=0.25, gamma=2.0):
    """The loss by the kernels, whatever the device."""
    return _focal_loss_triton(flatten_all(logits, num_classes), labels, normalizers, num_classes, alpha, gamma)


@pytest.fixture(params=["kernel", "cpu"])
def path(request):
    return request.param


@pytest.fixture
def loss_fn(path):
    return kernel_loss if path == "kernel" else focal_loss


@pytest.fixture
def place(path, device):
    return device if path == "kernel" else torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles of both kinds in few logits, and images that do not start on a 16-byte boundary."""
    monkeypatch.setattr(module, "_TILE", 256)
    monkeypatch.setattr(module, "_CHUNK", 128)
    monkeypatch.setattr(one_pass, "_TILE", 512)
    monkeypatch.setattr(one_pass, "_PROGRAMS", 3)


def case(k, device="cpu", dtype=torch.float32, shapes=((7, 5), (3, 2)), foreground=0.02, ignored=0.02, spread=3.0):
    """Levels (2, 3K, H, W) in channels_last memory, labels (2, N), normalizers (2,)."""
    generator = torch.Generator().manual_seed(k)
    logits = [torch.randn(2, 3 * k, h, w, generator=generator) * spread - 1 for h, w in shapes]
    anchors = sum(3 * h * w for h, w in shapes)
    drawn = torch.rand(2, anchors, generator=generator)
    labels = torch.randint(0, k, (2, anchors), generator=generator, dtype=torch.int32)
    labels[drawn > foreground] = -1
    labels[drawn > 1 - ignored] = -2
    levels = [level.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_() for level in logits]
    return levels, labels.to(device), torch.tensor([3.0, 17.0], device=device)


def loss_and_grads(function, inputs, k, alpha=0.25, gamma=2.0, factor=1.0):
    logits, labels, normalizers = inputs
    loss = function(logits, labels, normalizers, k, alpha, gamma)
    return loss.detach(), torch.autograd.grad(loss * factor, logits)


def exact(inputs, k, alpha=0.25, gamma=2.0, factor=1.0):
    logits, labels, normalizers = inputs
    logits = [level.detach().cpu().double().requires_grad_() for level in logits]
    doubles = logits, labels.cpu(), normalizers.cpu().double()
    return loss_and_grads(focal_loss_reference, doubles, k, alpha, gamma, factor)


def error(ours, theirs):
    """Relative norm of the difference, over one tensor or the levels' gradients together."""
    ours, theirs = (
        torch.cat([t.detach().cpu().double().flatten() for t in (x if isinstance(x, tuple | list) else [x])])
        for x in (ours, theirs)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


# Matches the reference


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.25, 0.0), (1.0, 1.5), (-1.0, 2.0), (0.5, 0.5)])
@pytest.mark.parametrize("k", [1, 7, 91])
def test_float32_is_within_1e_5_of_float64(k, alpha, gamma, loss_fn, place, small_tiles):
    shapes = ((7, 5), (3, 2)) if k < 91 else ((3, 2), (1, 1))
    inputs = case(k, place, shapes=shapes)
    loss, grads = loss_and_grads(loss_fn, inputs, k, alpha, gamma, factor=3.0)
    expected, expected_grads = exact(inputs, k, alpha, gamma, factor=3.0)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


def test_the_real_tile_sizes(device):
    inputs = case(91, device, torch.bfloat16, shapes=((11, 9), (1, 1)), foreground=0.003, ignored=0.003)
    loss, grads = loss_and_grads(kernel_loss, inputs, 91)
    expected, expected_grads = exact(inputs, 91)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_eager_error(dtype, loss_fn, place, small_tiles):
    k = 7
    logits, labels, normalizers = case(k, place, dtype)
    loss, grads = loss_and_grads(loss_fn, (logits, labels, normalizers), k)
    expected, expected_grads = exact((logits, labels, normalizers), k)

    x = torch.cat(flatten_all(logits, k), dim=1)
    targets = (labels[..., None] == torch.arange(k, device=place)).to(dtype)
    eager = sigmoid_focal_loss(x, targets)[labels != -2]
    image = torch.arange(2, device=place)[:, None].expand_as(labels)[labels != -2]
    eager_loss = (eager / normalizers.to(dtype)[image, None]).sum()
    eager_grads = torch.autograd.grad(eager_loss, logits)
    assert error(loss, expected) <= 2 * error(eager_loss, expected)
    assert error(grads, expected_grads) <= 2 * error(eager_grads, expected_grads)


@triton.jit
def exp2_at_its_worst(x, PTX: tl.constexpr):
    return tl.exp2(x) * (1 + 2.3841858e-07)


@triton.jit
def reciprocal_at_its_worst(x, PTX: tl.constexpr):
    return (1 / x) * (1 - 1.1920929e-07)


@pytest.mark.skipif(not INTERPRETED, reason="the model stands in for the hardware's approximations")
@pytest.mark.parametrize(("spread", "shift"), [(3.0, 0.0), (0.1, -4.6), (0.1, -7.0), (0.5, 8.0)])
@pytest.mark.parametrize("worst", [("exp2",), ("reciprocal",), ("exp2", "reciprocal")])
def test_approximations_at_their_documented_worst_stay_within_1e_5(worst, spread, shift, monkeypatch, small_tiles):
    for name in worst:
        monkeypatch.setattr(fast_math, name, globals()[f"{name}_at_its_worst"])
    logits, labels, normalizers = case(7, spread=spread)
    logits = [(level.detach() + shift).requires_grad_() for level in logits]
    loss, grads = loss_and_grads(kernel_loss, (logits, labels, normalizers), 7)
    expected, expected_grads = exact((logits, labels, normalizers), 7)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_lie_as_the_logits_lie(dtype, loss_fn, place, small_tiles):
    inputs = case(7, place, dtype)
    _, grads = loss_and_grads(loss_fn, inputs, 7)
    for grad, level in zip(grads, inputs[0], strict=True):
        assert grad.dtype == level.dtype
        assert grad.stride() == level.stride()


@pytest.mark.parametrize("form", ["NCHW", "flat", "one tensor"])
def test_other_layouts(form, loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place)
    expected, expected_grads = exact((logits, labels, normalizers), 7)
    flat = flatten_all(logits, 7)
    forms = {"NCHW": [level.contiguous() for level in logits], "flat": flat, "one tensor": [torch.cat(flat, dim=1)]}
    loss = loss_fn(forms[form], labels, normalizers, 7)
    assert error(loss, expected) < 1e-5
    assert error(torch.autograd.grad(loss, logits), expected_grads) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_backward(dtype, loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place, dtype)
    loss = loss_fn(logits, labels, normalizers, 7)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-11
    for factor in (1.0, 5.0):
        for grad in torch.autograd.grad(loss * factor, logits, retain_graph=True):
            grad.mul_(100)  # what a user does to the first must not reach the second
    second = torch.autograd.grad(loss * 3, logits, retain_graph=True)
    third = torch.autograd.grad(loss * 0.5, logits)
    for grads, factor in ((second, 3.0), (third, 0.5)):
        assert error(grads, exact((logits, labels, normalizers), 7, factor=factor)[1]) < tolerance


def test_double_backward_is_refused(loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place)
    loss = loss_fn(logits, labels, normalizers, 7)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_float16_under_a_gradient_scaler_flushes_nothing(loss_fn, place, small_tiles):
    """At the logits of an untrained head, a background gradient rounded before GradScaler's factor would be zero."""
    logits, labels, normalizers = case(7, place, torch.float16, foreground=0.0, spread=0.1)
    logits = [(level.detach() - 3.6).requires_grad_() for level in logits]  # about -4.6
    inputs = logits, labels, normalizers * 100
    _, grads = loss_and_grads(loss_fn, inputs, 7, factor=65536.0)
    _, expected = exact(inputs, 7, factor=65536.0)
    assert all((grad != 0).sum() == (exactly != 0).sum() for grad, exactly in zip(grads, expected, strict=True))
    assert error(grads, expected) < 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_kept_for_backward(dtype, loss_fn, place):
    logits, labels, normalizers = case(91, place, dtype)
    kept: dict[int, int] = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss_fn(logits, labels, normalizers, 91)
    assert sum(kept.values()) <= 1.1 * sum(level.nbytes for level in logits)


@pytest.mark.parametrize("factor", [1.0, -0.5, float("nan")])
def test_scaling_in_place(factor, device, small_tiles):
    tensors = [torch.randn(n, device=device) for n in (1, 37, 2048, 5000)]
    expected = [tensor * factor for tensor in tensors]
    one_pass.scale_op(tensors, torch.tensor(factor, device=device))
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="hardware faults on a misaligned access by itself")
def test_background_tiles_start_on_16_byte_boundaries(monkeypatch, small_tiles):
    """The compiler is told so, and makes 16-byte accesses of it."""
    background_tile, addresses = module._background_tile, []

    def checked(x_ptr, *arguments):
        addresses.append(x_ptr.handle.data.item())
        return background_tile(x_ptr, *arguments)

    monkeypatch.setattr(module, "_background_tile", checked)
    loss_and_grads(kernel_loss, case(7), 7)
    assert addresses
    assert not any(address % 16 for address in addresses)


# Edges


@pytest.mark.parametrize(
    ("foreground", "ignored"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)], ids=["none", "ignored", "all"]
)
@pytest.mark.parametrize("k", [1, 7])
def test_no_foreground_all_ignored_all_foreground(k, foreground, ignored, loss_fn, place, small_tiles):
    inputs = case(k, place, foreground=foreground, ignored=ignored)
    loss, grads = loss_and_grads(loss_fn, inputs, k)
    expected, expected_grads = exact(inputs, k)
    if ignored:
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)
    else:
        assert error(loss, expected) < 1e-5
        assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("label", [-2, -1, 0, 4])
def test_one_anchor(label, loss_fn, place):
    logits = [torch.linspace(-2, 3, 5, device=place).reshape(1, 1, 5).requires_grad_()]
    labels = torch.tensor([[label]], dtype=torch.int32, device=place)
    inputs = logits, labels, torch.ones(1, device=place)
    loss, grads = loss_and_grads(loss_fn, inputs, 5)
    expected, expected_grads = exact(inputs, 5)
    torch.testing.assert_close(loss.cpu(), expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0].cpu(), expected_grads[0].float(), rtol=1e-5, atol=1e-9)


def test_an_empty_level_and_an_empty_batch(loss_fn, place):
    logits, labels, normalizers = case(7, place)
    empty = torch.empty(2, 21, 0, 4, device=place)
    assert error(loss_fn([logits[0], empty, logits[1]], labels, normalizers, 7), exact(case(7), 7)[0]) < 1e-5
    assert loss_fn([torch.empty(0, 9, 7, device=place)], labels.new_empty(0, 9), normalizers[:0], 7) == 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_80(sign, loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place, foreground=0.5)
    logits = [(level.detach().sign() * 80 * sign).requires_grad_() for level in logits]
    loss, grads = loss_and_grads(loss_fn, (logits, labels, normalizers), 7)
    expected, expected_grads = exact((logits, labels, normalizers), 7)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("label", [-1, 3])
def test_nan_surfaces_but_not_from_ignored_anchors(label, loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place, foreground=0.0, ignored=0.0)
    labels[1, 50] = label
    poisoned = logits[0].detach().clone()
    poisoned.permute(0, 2, 3, 1).view(2, -1, 7)[1, 50, 3] = torch.nan
    logits[0] = poisoned.requires_grad_()
    loss, grads = loss_and_grads(loss_fn, (logits, labels, normalizers), 7)
    assert loss.isnan()
    assert grads[0].isnan().sum() == 1
    labels[1, 50] = -2
    loss, grads = loss_and_grads(loss_fn, (logits, labels, normalizers), 7)
    assert loss.isfinite()
    assert grads[0].isfinite().all()


def test_labels_out_of_range_stay_in_bounds(device, small_tiles):
    """On a GPU they cannot raise without a wait; they count as background."""
    logits, labels, normalizers = case(7, device)
    background = labels.clone()
    for i, label in enumerate((7, 1000, 2**31 - 1, -3, -(2**31))):
        labels[:, i::17] = label
        background[:, i::17] = -1
    loss, grads = loss_and_grads(kernel_loss, (logits, labels, normalizers), 7)
    expected, expected_grads = exact((logits, background, normalizers), 7)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5


def test_every_gradient_is_written_and_the_sum_is_deterministic(device, small_tiles):
    inputs = case(7, device)
    torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
    try:
        loss, grads = loss_and_grads(kernel_loss, inputs, 7)
        again, _ = loss_and_grads(kernel_loss, inputs, 7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(loss, again)


def test_offsets_beyond_two_to_the_31(device):
    """Tile 0 of three images of 2^30 logits and more: only the pages that it touches exist on a CPU."""
    k, tile, anchors = 91, module._TILE, 2**30 // 91 + 1
    level, grad = (torch.empty(3, anchors, k, dtype=torch.bfloat16, device=device) for _ in range(2))
    labels = torch.empty(3, anchors, dtype=torch.int32, device=device)
    x = torch.randn(3, tile, dtype=torch.bfloat16, device=device)
    level.view(3, -1)[:, :tile] = x
    labels[:, : tile // k + 1] = -1
    labels[2, 5] = 17
    partials = torch.empty(3, 1, device=device)
    starts, first_tiles = codes((0, anchors)), codes((0, 1))
    module._focal_loss_kernel[(1, 3)](
        (level,), (grad,), labels, torch.ones(3, device=device), partials, None, starts, first_tiles, anchors,
        0.75, 0.25, K=k, GAMMA=2.0, TILE=tile, CHUNK=module._CHUNK, TILE_ANCHORS=128, WITH_GRADS=True, PTX=module.PTX,
    )  # fmt: skip
    for image in range(3):
        shift = image * anchors * k & 15  # image 2 starts beyond 2^31; its tile at the boundary before
        rows = (tile - shift) // k
        expected, expected_grads = exact(
            ([x[image, : rows * k].view(1, rows, k)], labels[image : image + 1, :rows], torch.ones(1)), k
        )
        assert error(grad[image, :rows], expected_grads) < 2**-7
        assert abs(partials[image, 0].cpu() - expected) < 0.02 * expected  # but for the tile's last, cut anchor


def test_errors(loss_fn, device):
    logits, labels, normalizers = case(7)
    with pytest.raises(ValueError, match="labels"):
        focal_loss(logits, labels[:, 1:], normalizers, 7)
    with pytest.raises(ValueError, match=r"A\*8"):
        focal_loss(logits, labels, normalizers, 8)
    with pytest.raises(ValueError, match="dtype"):
        focal_loss([logits[0], logits[1].half()], labels, normalizers, 7)


# Registration


@pytest.mark.parametrize("with_grads", [True, False])
def test_opcheck(with_grads, device, small_tiles):
    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    levels = flatten_all([level.detach() for level in logits], 2)
    levels = [level.contiguous().requires_grad_() for level in levels]
    torch.library.opcheck(module._focal_loss_op, (levels, labels, normalizers, None, 2, 0.25, 2.0, True, with_grads))


def test_opcheck_of_the_backward_ops(device, small_tiles):
    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    levels = [level.detach().contiguous() for level in flatten_all(logits, 2)]
    factor = torch.tensor(3.0, device=device)
    torch.library.opcheck(module._focal_loss_op, (levels, labels, normalizers, factor, 2, 0.25, 2.0, False, True))
    torch.library.opcheck(one_pass.scale_op, (levels, factor))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_no_copy_of_a_gradient(dynamic, device, small_tiles):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    backwards = []

    def keep(graph, inputs):
        backwards.append(graph)
        return make_boxed_func(graph.forward)

    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=keep)
    compiled = torch.compile(kernel_loss, fullgraph=True, backend=backend, dynamic=dynamic)
    loss, grads = loss_and_grads(compiled, (logits, labels, normalizers), 2, factor=3.0)
    expected, expected_grads = exact((logits, labels, normalizers), 2, factor=3.0)
    assert error(loss, expected) < 1e-5
    assert error(grads, expected_grads) < 1e-5
    calls = [str(node.target) for node in backwards[0].graph.nodes if node.op == "call_function"]
    assert sum("retina_fast" in call for call in calls) == 1
    assert not [call for call in calls if any(copy in call for copy in ("clone", "copy", "functionalized", "mul"))]


def test_the_cpu_path_compiles_whole():
    logits, labels, normalizers = case(2, shapes=((3, 2),))
    compiled = torch.compile(focal_loss, fullgraph=True, backend="aot_eager")
    _loss, grads = loss_and_grads(compiled, (logits, labels, normalizers), 2)
    assert error(grads, exact((logits, labels, normalizers), 2)[1]) < 1e-5


def test_autocast_changes_nothing(loss_fn, place, small_tiles):
    logits, labels, normalizers = case(7, place, torch.bfloat16)
    loss, grads = loss_and_grads(loss_fn, (logits, labels, normalizers), 7)
    with torch.autocast(place.type, dtype=torch.bfloat16):
        again, again_grads = loss_and_grads(loss_fn, (logits, labels, normalizers), 7)
    assert loss.dtype == again.dtype == torch.float32
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


def test_imports_and_runs_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.kernels.sigmoid_focal_loss import sigmoid_focal_loss
print(focal_loss([torch.zeros(1, 1, 1)], torch.tensor([[0]]), torch.ones(1), 1).item(), sigmoid_focal_loss)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("0.043")


# As compiled code


@pytest.mark.parametrize("name", names("focal_loss"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("focal_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

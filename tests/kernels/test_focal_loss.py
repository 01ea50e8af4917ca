"""The focal loss of integer labels: the kernels, and the tiled CPU path, against float64 autograd of the definition."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from retina_fast.kernels import fast_math
from retina_fast.kernels import focal_loss as module
from retina_fast.kernels.dispatch import INTERPRETED, tl, triton
from retina_fast.kernels.focal_loss import focal_loss
from retina_fast.kernels.levels import encode_sizes, flatten_all
from tests.kernels.focal_cases import case, error, exact, kernel_loss, loss_and_grads
from tests.ptx.cases import OTHER_ORDERS, check, names

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


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("value", [-15.0, -7.0, -4.595, -2.0, 1.0])
def test_roundings_of_many_equal_logits_do_not_add_up(value, gamma):
    """As of a detector whose training begins: all elements, and their roundings, are nearly the same."""
    logits, labels, normalizers = case(91, shapes=((32, 20), (8, 5)), foreground=0.002)
    logits = [(0 * level.detach() + value).requires_grad_() for level in logits]
    loss, grads = loss_and_grads(focal_loss, (logits, labels, normalizers), 91, gamma=gamma)
    expected, expected_grads = exact((logits, labels, normalizers), 91, gamma=gamma)
    assert error(loss, expected) < 3e-6
    assert error(grads, expected_grads) < 3e-6


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


# Edges


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_normalizer_of_0_gives_infinity_as_the_definition_does(gamma, small_tiles):
    logits, labels, _ = case(7, ignored=0.0)
    inputs = logits, labels, torch.tensor([0.0, 1.0])
    loss, grads = loss_and_grads(focal_loss, inputs, 7, gamma=gamma)
    expected, expected_grads = exact(inputs, 7, gamma=gamma)
    assert loss == expected == float("inf")
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert torch.equal(ours[0], theirs[0].float())
        torch.testing.assert_close(ours[1], theirs[1].float())


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
    k, tile, anchors = 91, module._TILE_BYTES // 2, 2**30 // 91 + 1
    level, grad = (torch.empty(3, anchors, k, dtype=torch.bfloat16, device=device) for _ in range(2))
    labels = torch.empty(3, anchors, dtype=torch.int32, device=device)
    x = torch.randn(3, tile, dtype=torch.bfloat16, device=device)
    level.view(3, -1)[:, :tile] = x
    labels[:, : tile // k + 1] = -1
    labels[2, 5] = 17
    partials = torch.empty(3, 1, device=device)
    starts, first_tiles = encode_sizes((0, anchors)), encode_sizes((0, 1))
    module._focal_loss_kernel[(1, 3)](
        (level,), (grad,), labels, None, torch.ones(3, device=device), partials, None, starts, first_tiles,
        anchors, 0.75, 0.25, K=k, GAMMA=2.0, KIND="focal", TILE=tile, CHUNK=module._CHUNK,
        TILE_ANCHORS=128, AHEAD=4, WITH_GRADS=True, PTX=module.PTX,
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


# As compiled code


@pytest.mark.parametrize("name", names("focal_loss"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("focal_loss"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

"""Gradients of the focal loss, what is kept for them, and the operation in compiled graphs."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from retina_fast.kernels import focal_loss as module
from retina_fast.kernels.dispatch import INTERPRETED
from retina_fast.kernels.focal_loss import focal_loss, focal_loss_reference
from retina_fast.kernels.levels import flatten_all
from tests.kernels.focal_cases import case, error, exact, kernel_loss, loss_and_grads
from tests.kernels.twice import assert_differentiable_twice

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


def test_second_derivatives(loss_fn, place, small_tiles):
    arguments: Any = *case(7, place), 7
    losses = (lambda: loss_fn(*arguments)), (lambda: focal_loss_reference(*arguments))
    assert_differentiable_twice("focal_loss", losses, arguments[0], 1e-4)


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
    """One gradient, and the logits themselves, which lie in memory anyway; in float16 the logits alone."""
    logits, labels, normalizers = case(91, place, dtype)
    kept: dict[int, int] = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss_fn(logits, labels, normalizers, 91)
    for level in logits:
        kept.pop(level.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 1.1 * sum(level.nbytes for level in logits)


@pytest.mark.skipif(not INTERPRETED, reason="hardware faults on a misaligned access by itself")
@pytest.mark.parametrize("kind", ["_background_tile", "_mixed_tile"])
def test_tiles_without_a_mask_start_on_16_byte_boundaries(kind, monkeypatch, small_tiles):
    """The compiler is told so, and makes 16-byte accesses of it."""
    tile, addresses = getattr(module, kind), []

    def checked(x_ptr, *arguments):
        masked = kind == "_mixed_tile" and arguments[-3]
        if not masked:
            addresses.append(x_ptr.handle.data.item())
        return tile(x_ptr, *arguments)

    monkeypatch.setattr(module, kind, checked)
    loss_and_grads(kernel_loss, case(7), 7)
    assert addresses
    assert not any(address % 16 for address in addresses)


# Registration


@pytest.mark.parametrize("with_grads", [True, False])
def test_opcheck(with_grads, device, small_tiles):
    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    levels = flatten_all([level.detach() for level in logits], 2)
    levels = [level.contiguous().requires_grad_() for level in levels]
    torch.library.opcheck(module._focal_loss_op, (levels, labels, normalizers, None, 2, 0.25, 2.0, True, with_grads))


def test_opcheck_of_the_backward_op(device, small_tiles):
    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    levels = [level.detach().contiguous() for level in flatten_all(logits, 2)]
    factor = torch.tensor(3.0, device=device)
    torch.library.opcheck(module._focal_loss_op, (levels, labels, normalizers, factor, 2, 0.25, 2.0, False, True))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_whole_with_no_copy_of_a_gradient(dynamic, device, small_tiles, monkeypatch):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    backwards = []

    def keep(graph, inputs):
        backwards.append(graph)
        return make_boxed_func(graph.forward)

    logits, labels, normalizers = case(2, device, shapes=((3, 2),))
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=keep)
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    compiled = torch.compile(focal_loss, fullgraph=True, backend=backend, dynamic=dynamic)
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

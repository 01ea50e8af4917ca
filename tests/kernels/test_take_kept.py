"""Taking the detections that were kept, against the definition."""

import pytest
import torch

from retina_fast.kernels import take_kept as module
from retina_fast.kernels.take_kept import take_kept, take_kept_reference
from tests.ptx.cases import OTHER_ORDERS, check, names


def case(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = torch.rand(3, 29, 4, generator=generator) * 50, torch.rand(3, 29, generator=generator)
    labels = torch.randint(0, 9, (3, 29), generator=generator)
    positions = torch.randint(0, 29, (3, 13), generator=generator)
    sizes, originals = torch.tensor([[40, 60], [64, 37], [9, 9]]), torch.tensor([[80, 121], [61, 39], [9, 9]])
    arguments = boxes, scores, labels, positions, torch.tensor([13, 0, 5]), sizes, originals
    return [argument.to(device) for argument in arguments]


def test_kernel_matches_the_reference(device):
    torch.use_deterministic_algorithms(True)  # fills empty buffers with NaN
    try:
        ours = module._op(*case(device))
    finally:
        torch.use_deterministic_algorithms(False)
    for field, expected in zip(ours, take_kept_reference(*case()), strict=True):
        assert torch.equal(field.cpu(), expected)


def test_boxes_and_scores_are_differentiable():
    boxes, scores, *rest = case()
    out, taken, _ = take_kept(boxes.requires_grad_(), scores.requires_grad_(), *rest)
    grads = torch.autograd.grad(out.sum() + taken.sum(), (boxes, scores))
    assert all(grad[0].any() and not grad[1].any() for grad in grads)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape, device):
    boxes, scores, labels, _, counts, sizes, originals = (argument[: shape[0]] for argument in case(device))
    positions = torch.zeros(shape, dtype=torch.int64, device=device)
    out = module._op(boxes, scores, labels, positions, counts, sizes, originals)
    assert [tuple(field.shape) for field in out] == [(*shape, 4), shape, shape]


def test_opcheck_and_compiles_whole(device):
    torch.library.opcheck(module._op, case(device))
    compiled = torch.compile(take_kept, fullgraph=True, backend="aot_eager", dynamic=True)
    for field, expected in zip(compiled(*case(device)), take_kept_reference(*case()), strict=True):
        assert torch.equal(field.cpu(), expected)


# As compiled code


@pytest.mark.parametrize("name", names("take_kept"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("take_kept"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

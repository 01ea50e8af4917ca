"""Second derivatives, which the losses compute by their references."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def assert_differentiable_twice(
    name: str, function: Callable[[], Tensor], reference: Callable[[], Tensor], inputs: Sequence[Tensor], rtol: float
) -> None:
    """A gradient penalty, the squared norm of a loss's gradient, has the reference's own gradients; it is warned of."""

    def penalty_grads(loss: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = torch.stack([grad.double().square().sum() for grad in grads]).sum()
        return torch.autograd.grad(penalty, inputs, materialize_grads=True)

    with pytest.warns(UserWarning, match=f"{name}: create_graph=True"):
        found = penalty_grads(function())
    expected = penalty_grads(reference())
    assert any(grad.any() for grad in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= rtol * theirs.norm() + 1e-12

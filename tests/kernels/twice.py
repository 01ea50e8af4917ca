"""Second derivatives, which the losses compute by their references."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


def assert_differentiable_twice(
    name: str, losses: Sequence[Callable[[], Any]], inputs: Sequence[Tensor], rtol: float
) -> None:
    """A gradient penalty, the squared norm of a loss's gradient, has the gradients of the reference, and is warned of.

    ``losses`` are the operation's and the reference's.
    """

    def penalty_grads(loss: Any) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = torch.stack([grad.double().square().sum() for grad in grads]).sum()
        return torch.autograd.grad(penalty, inputs, materialize_grads=True)

    with pytest.warns(UserWarning, match=f"{name}: create_graph=True"):
        found = penalty_grads(losses[0]())
    expected = penalty_grads(losses[1]())
    assert any(grad.any() for grad in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= rtol * theirs.norm() + 1e-12

"""Every difference from torchvision's detections is the rounding of its own arithmetic."""

import pytest
import torch

from benchmarks.models.agreement import measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_torchvisions_rounding_differs(dtype):
    rate = measure(25, dtype)
    assert rate["total"] > 0
    assert rate["unexplained"] == 0
    assert rate["detections"] <= 0.01 * rate["total"]
    if dtype == torch.float32:  # in bfloat16 it is ties, which without_ties tells apart
        assert rate["margin"] <= 1e-3

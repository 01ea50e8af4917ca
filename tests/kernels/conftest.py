"""The paths of the focal loss, which several files of its tests go through."""

import pytest
import torch

from retina_fast.kernels import focal_loss as module
from retina_fast.kernels import focal_loss_cpu, one_pass
from retina_fast.kernels.focal_loss import focal_loss
from tests.kernels.focal_cases import kernel_loss


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
    monkeypatch.setattr(module, "_TILE_BYTES", 1024)
    monkeypatch.setattr(module, "_CHUNK", 128)
    monkeypatch.setattr(module, "_AHEAD_BYTES", 512)
    monkeypatch.setattr(focal_loss_cpu, "_TILE", 100)
    monkeypatch.setattr(one_pass, "_TILE", 512)
    monkeypatch.setattr(one_pass, "_PROGRAMS", 3)

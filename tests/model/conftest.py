"""Fixtures that several tests of the model use."""

import pytest
import torch

import retina_fast
from tests.model.pairs import torchvision_model
from tests.model.recorded_graph import play_on_cpu


@pytest.fixture
def model():
    return retina_fast.from_torchvision(torchvision_model()).train()


@pytest.fixture
def graphs(monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        play_on_cpu(monkeypatch)

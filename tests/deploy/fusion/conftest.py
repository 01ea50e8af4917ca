import pytest

from retina_fast.deploy.fusion import layers


@pytest.fixture(autouse=True)
def _fused_however_small(monkeypatch):
    """The convs of these tests are small ones, which PyTorch's own conv would compute."""
    monkeypatch.setattr(layers, "_SMALL_WORK", 0)

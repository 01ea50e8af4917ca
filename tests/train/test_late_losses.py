from types import SimpleNamespace

import torch

from retina_fast.train.late_losses import LateLosses


class OnGPU(torch.Tensor):
    device = torch.device("cuda")


def test_losses_on_a_gpu_are_read_when_the_next_step_is_queued(monkeypatch):
    waited: list[str] = []
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: waited.append("waited"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    late, seen = LateLosses(), list[dict[str, float]]()
    for step in (1, 2):
        late.add({"a": torch.tensor(float(step)).as_subclass(OnGPU)}, seen.append)
        assert (len(seen), len(waited)) == (step - 1, step - 1)
    late.read()
    late.read()
    assert seen == [{"a": 1.0}, {"a": 2.0}]
    assert len(waited) == 2

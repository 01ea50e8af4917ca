from types import SimpleNamespace
from typing import Any

import torch

from retina_fast.train.averaging import Averaging


def test_the_average_forgets_the_start_and_then_slowly():
    network: Any = torch.nn.BatchNorm1d(3)
    averaging: Any = Averaging(limit=0.998)
    average: Any = torch.optim.swa_utils.AveragedModel(network)
    averaging._average_model = average
    expected = torch.zeros(3)
    for step in range(30):
        with torch.no_grad():
            network.weight.fill_(step**2)
            network.num_batches_tracked.fill_(step)
        averaging.on_train_batch_end(SimpleNamespace(global_step=step + 1), network, None, None, 0)
        decay = (step + 1) / (step + 20) if step else 0
        expected = decay * expected + (1 - decay) * step**2
        torch.testing.assert_close(average.module.weight.detach(), expected)
        assert average.module.num_batches_tracked == step
    assert average.n_averaged == 30

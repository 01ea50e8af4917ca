"""A moving average of the weights of a training run."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging


class Averaging(WeightAveraging):
    """Lightning's moving average, with a decay that grows from step to step up to a limit.

    So the average forgets the random start of the weights soon, and later changes slowly. Only the update is not
    Lightning's: there, torch would read the number of updates from the device in each step.

    Args:
        limit: the largest decay, 0 to 1; 0 keeps the latest weights.

    Example::

        >>> L.Trainer(callbacks=[Averaging(limit=0.998)])  # doctest: +SKIP
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._average_model is not None
        count = trainer.global_step - 1
        decay = min(self.limit, (count + 1) / (count + 20)) if count else 0
        models = self._average_model.module, pl_module
        both = [[*model.parameters(), *model.buffers()] for model in models]
        averages, values = ([x for x in tensors if x.is_floating_point()] for tensors in both)
        torch._foreach_lerp_(averages, values, 1 - decay)
        averages, values = ([x for x in tensors if not x.is_floating_point()] for tensors in both)
        if averages:
            torch._foreach_copy_(averages, values)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

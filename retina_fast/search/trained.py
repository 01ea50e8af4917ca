"""A score of a specification by training: a short run of a narrow network, ended early if it promises little.

The narrow network is that of the paper's search: widths and links at a quarter, heads of 64 channels. The score is the
negative training loss, which orders networks long before their AP does (Ru et al. 2021, the speed of training,
https://arxiv.org/abs/2006.04492), and which needs no statistics of norms that a short run does not have; or a metric of
the validation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from retina_fast.backbones.specification import Block, as_rows
from retina_fast.backbones.spinenet import Size
from retina_fast.backbones.spinenet_mobile import MobileSize
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.train import TrainSettings, train

PROXY_SIZE = Size(0.25, 0.25, 1, 64, 64, 4, 512, 3)
"""The widths of the paper's search; its images have 512 pixels."""

MOBILE_PROXY_SIZE = MobileSize(0.35, 24, 256)
"""The same for inverted bottlenecks; nothing is published."""

LOSS = "loss"

Report = Callable[[int, float], None]
"""Called after the n-th part of a run, from 1, with the score there; it raises to end the run."""


@dataclass(frozen=True)
class Proxy:
    """How the runs train that score specifications; all of them alike.

    Attributes:
        data: the images to train on.
        validation: those to score on by another metric than the loss.
        size: widths and depths of the network.
        model: the builder, of the family of the size.
        steps: of a run.
        parts: of equal length; after each the score is reported, and the run may be ended.
        batch_size: images a step.
        crop: side of the training crops in pixels.
        image_scale: the factor by which the network scales the images.
        flips: see `TrainSettings`.
        metric: ``loss``, the negative sum of the losses in training, their mean over the last part; or a metric of
            the validation, such as AP50.
        workers: processes that prepare images.
    """

    data: CocoDataset
    validation: CocoDataset | None = None
    size: Size | MobileSize = PROXY_SIZE
    model: str = "retinanet_spinenet49"
    steps: int = 300
    parts: int = 3
    batch_size: int = 4
    crop: int = 256
    image_scale: float = 1.0
    flips: Flips = Flips.HORIZONTAL
    metric: str = LOSS
    workers: int = 0

    def score(self, blocks: Sequence[Block], output: Path, seed: int = 0, report: Report | None = None) -> float:
        """Train a specification and return its score after the last step; more is better.

        Args:
            blocks: a checked specification.
            output: the folder of the run's files.
            seed: of the run.
            report: is told the score after each part.

        Raises:
            UserError: if the loss is not finite, or the metric is not one that validation measures.

        Example::

            >>> Proxy(data).score(SPINENET, Path("runs/proxy"))  # doctest: +SKIP
            -1.31
        """
        settings = TrainSettings(
            self.model,
            steps=self.steps,
            batch_size=self.batch_size,
            crop=self.crop,
            flips=self.flips,
            seed=seed,
            image_scale=self.image_scale,
            every=-(-self.steps // self.parts),
            arguments={"specification": as_rows(blocks), "size": [*self.size]},
        )
        scores: list[float] = []

        def note(loss: float, metrics: dict[str, float]) -> None:
            scores.append(self._value(loss, metrics))
            if report:
                report(len(scores), scores[-1])

        callback = _AfterEachPart(note)
        train(
            settings, self.data, validation=self.validation, output=output, workers=self.workers, callbacks=[callback]
        )
        return scores[-1]

    def _value(self, loss: float, metrics: dict[str, float]) -> float:
        if self.metric == LOSS:
            return -loss
        if self.metric not in metrics:
            known = ", ".join([LOSS, *sorted(metrics)])
            raise UserError(f"metric must be one of {known}, got {self.metric}; all but loss need validation data")
        return metrics[self.metric]


class _AfterEachPart(L.Callback):
    """Calls a function with the mean loss of each interval and the metrics of its validation, if there is one."""

    def __init__(self, note: Callable[[float, dict[str, float]], None]) -> None:
        self._note = note
        self._losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(torch.stack([loss.detach() for loss in outputs.values()]).sum())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        self._note(loss, pl_module.metrics)  # pyrefly: ignore[bad-argument-type]

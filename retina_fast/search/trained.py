"""A score of a specification by training: a short run of a narrow network, ended early if it promises little.

The narrow network is that of the paper's search: widths and links at a quarter, heads of 64 channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from torch.nn.modules.batchnorm import _BatchNorm

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
_MOMENTUM = 0.1  # PyTorch's own: a hundred steps are too few for the published 0.01

Report = Callable[[int, float], None]
"""Called after the n-th validation, from 1, with the score there; it raises to end the run."""


@dataclass(frozen=True)
class Proxy:
    """How the runs train that score specifications; all of them alike.

    Attributes:
        data: the images to train on.
        validation: those to score on.
        size: widths and depths of the network.
        model: the builder, of the family of the size.
        steps: of a run.
        validations: of a run, one after each equal part of its steps.
        batch_size: images a step.
        crop: side of the training crops in pixels.
        image_scale: the factor by which the network scales the images.
        flips: see `TrainSettings`.
        metric: ``loss``, the negative sum of the validation losses, or a metric of the validation's log, such as AP50.
        workers: processes that prepare images.
    """

    data: CocoDataset
    validation: CocoDataset
    size: Size | MobileSize = PROXY_SIZE
    model: str = "retinanet_spinenet49"
    steps: int = 300
    validations: int = 3
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
            report: is told the score after each validation.

        Raises:
            UserError: if the loss is not finite, or the metric is not one that validation measures.

        Example::

            >>> Proxy(data, validation).score(SPINENET, Path("runs/proxy"))  # doctest: +SKIP
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
            every=-(-self.steps // self.validations),
            arguments={"specification": as_rows(blocks), "size": [*self.size]},
        )
        scores: list[float] = []

        def note(metrics: dict[str, float]) -> None:
            scores.append(self._value(metrics))
            if report:
                report(len(scores), scores[-1])

        callback = _AfterValidation(note)
        train(
            settings, self.data, validation=self.validation, output=output, workers=self.workers, callbacks=[callback]
        )
        return scores[-1]

    def _value(self, metrics: dict[str, float]) -> float:
        if self.metric == LOSS:
            return -sum(value for name, value in metrics.items() if name.startswith("val_"))
        if self.metric not in metrics:
            raise UserError(f"the metric must be loss, {', '.join(sorted(metrics))}, not {self.metric}")
        return metrics[self.metric]


class _AfterValidation(L.Callback):
    """Calls a function with the metrics of each validation, when the files of the interval are written."""

    def __init__(self, note: Callable[[dict[str, float]], None]) -> None:
        self._note = note

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                norm.momentum = _MOMENTUM

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._note(module.metrics)  # type: ignore[arg-type]

"""The network in training, for Lightning: its steps and its validation."""

import functools
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from retina_fast.checkpoint import Checkpoint
from retina_fast.data.augment import mixed_seed
from retina_fast.data.coco import CocoDataset, Sample, as_results
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.metrics import CocoMetrics, coco_metrics
from retina_fast.data.processes import Processes
from retina_fast.device import to_device
from retina_fast.losses import AtssMatcher, TaskAlignedMatcher
from retina_fast.train.recipes import all_trained, recipe_named
from retina_fast.train.settings import ResolvedSettings
from retina_fast.train.synced_norm import synced
from retina_fast.training_step import TrainingStep

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class _TakesItsStepInAClosure(torch.optim.Optimizer):
    """An optimizer whose `step(closure)` only calls the closure, which takes the optimizer's step itself.

    Lightning counts steps by the calls of `optimizers().step(closure)`, while the step is TrainingStep's, which may
    replay it.
    """

    def step(self, closure: Any = None) -> Any:
        return closure() if closure else super().step()


def _with_step_in_a_closure(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, which is then also a :class:`_TakesItsStepInAClosure`."""
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_TakesItsStepInAClosure, kind), {})
    return optimizer


class Detector(L.LightningModule):
    """The network, its losses, its optimizer and its validation.

    Args:
        network: a RetinaNet in training mode.
        about: how the network is built and what it finds, without its weights.
        settings: of the run.
        processes: those that train together.

    Attributes:
        validated: the metrics of the validation of this interval, in the first process; None before it and without one.

    Example::

        >>> Detector(*starting_network(settings, data), settings, ALONE).recipe.gradient_norm  # doctest: +SKIP
        1.0
    """

    def __init__(self, network: Any, about: Checkpoint, settings: ResolvedSettings, processes: Processes) -> None:
        super().__init__()
        self.about, self.settings, self.processes = about, settings, processes
        self.recipe = recipe_named(settings.recipe)
        # channels_last is a tenth faster than the default layout on a CPU, too.
        self.model: Any = network.to(memory_format=torch.channels_last)
        self.model.focal_gamma = self.recipe.focal_gamma
        self._matcher = self.model.proposal_matcher
        if processes.count > 1:
            self.model = synced(self.model)
        self.validated: CocoMetrics | None = None
        self.automatic_optimization = False  # TrainingStep takes the steps

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the last validation by name; none without one."""
        return self.validated.values if self.validated else {}

    def on_train_epoch_start(self) -> None:
        self.validated = None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # The batch stays on the host: training_step moves the images, and TrainingStep checks the targets before it
        # moves them, which costs nothing on the host.
        return batch

    def on_train_start(self) -> None:
        optimizer = self.optimizers().optimizer  # pyrefly: ignore[missing-attribute]
        self.take_step = TrainingStep(
            self.model if self.processes.count == 1 else DistributedDataParallel(self.model),
            optimizer,
            max_grad_norm=self.recipe.gradient_norm,
            dtype=torch.bfloat16 if self.settings.bf16 else None,
            accumulate=self.settings.accumulate,
            loss_weights={"bbox_regression": self.recipe.box_weight},
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What the network itself draws must depend on the seed, the step and the process, and not on what ran before.
        torch.manual_seed(mixed_seed(self.settings.seed, self.global_step, self.processes.rank))
        if isinstance(self._matcher, TaskAlignedMatcher):
            # As its authors train: scores of random heads cannot tell which anchor fits an object.
            early = self.global_step < self.settings.steps // 3
            self.model.proposal_matcher = AtssMatcher() if early else self._matcher

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        images = [to_device(image, self.device).to(self.dtype) / 255 for image in images]
        losses: dict[str, Tensor] = self.optimizers().step(lambda: self.take_step(images, targets))  # pyrefly: ignore[missing-attribute]
        self.lr_schedulers().step()  # pyrefly: ignore[missing-attribute]
        return losses

    def configure_optimizers(self) -> Any:
        decayed = self.recipe.decayed_parameters(self.model)
        others = {*all_trained(self.model)} - {*decayed}
        undecayed = [p for p in self.parameters() if p in others]
        pairs = ((decayed, self.recipe.weight_decay), (undecayed, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in pairs if params]
        optimizer = _with_step_in_a_closure(self.recipe.optimizer(groups, lr=self.settings.lr))
        schedule = functools.partial(self.recipe.schedule, total=self.settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)}

    def on_validation_epoch_start(self) -> None:
        self._found: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []  # image, losses, detections

    def validation_step(self, batch: Sample | ImageError, batch_idx: int) -> None:
        if isinstance(batch, ImageError):
            warnings.warn(f"{batch}; validation goes on without it", stacklevel=1)
            return
        image, target = batch
        image = to_device(image, self.device).to(self.dtype) / 255
        losses, (detections,) = self.model.losses_and_detections([image], [target])
        index = self.processes.share(len(self._validation_data()))[batch_idx]
        self._found.append((index, losses, {name: value.cpu() for name, value in detections.items()}))

    def on_validation_epoch_end(self) -> None:
        shares = self.processes.gather([(index, _floats(losses), found) for index, losses, found in self._found])
        if not self.processes.first:
            return
        data = self._validation_data()
        whole = sorted((entry for share in shares for entry in share), key=lambda entry: entry[0])
        if not whole:
            raise UserError(f"{data.folder}: not one validation image can be read")
        ids = [data.images[index]["id"] for index, _, _ in whole]
        results = [
            row
            for image_id, (_, _, found) in zip(ids, whole, strict=True)
            for row in as_results(found, image_id, list(data.category_ids))
        ]
        means = {
            f"val_{name}": float(torch.tensor([losses[name] for _, losses, _ in whole]).mean()) for name in whole[0][1]
        }
        self.validated = coco_metrics(data.coco, results, ids, self.model.detections_per_img)
        self.validated.values.update(means)

    def _validation_data(self) -> CocoDataset:
        return self.trainer.val_dataloaders.dataset.dataset  # pyrefly: ignore[missing-attribute]


def _floats(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}

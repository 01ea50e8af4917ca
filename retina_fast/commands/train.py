"""Training on a COCO data set, with Lightning: `retina-fast train`.

One Lightning epoch is an interval of at most 500 steps. At its end the averaged weights are validated and the run's
files are written:

    last.ckpt   everything that --resume needs
    model.pt    the averaged weights, for evaluate and detect
    best.pt     those with the best AP50 in validation, if there is validation data
    log.csv     step, losses, learning rate, validation
    loss.png    the curves

A run that is stopped, at any moment, and resumed with the same settings ends with the same bits as one that is not: all
randomness comes from the seed and the step. (On another number of threads, sums round otherwise.)
"""

import contextlib
import functools
import logging
import math
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.late_losses import LateLosses
from retina_fast.commands.train_log import TrainLog
from retina_fast.data.augment import Flips, TrainingSet, batches, mixed_seed
from retina_fast.data.coco import CocoDataset, Sample, Tried, plain
from retina_fast.errors import ImageError, UserError
from retina_fast.metrics import as_results, coco_metrics
from retina_fast.recipes import recipe_named
from retina_fast.targets import to_device
from retina_fast.training_step import TrainingStep

_INTERVAL = 500

Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights of a run; a resumed run must have the same.

    Attributes:
        model: a builder's name in `retina_fast.builders.MODELS`.
        steps: optimizer steps, rounded up to a whole number of equal intervals.
        batch_size: images a step.
        lr: peak learning rate.
        crop: side of the training crops in pixels; 0 trains on whole images, or, with a published recipe, on crops
            of the model's own size.
        flips: which mirror images of a picture are as likely as itself.
        seed: of the weights, the order of the images and the augmentations.
        image_scale: by which the finished model scales images, whatever their size; training crops have scales of
            their own. None: the model resizes crops and images as its builder says.
        recipe: its name in `retina_fast.recipes.RECIPES`.
    """

    model: str
    steps: int
    batch_size: int
    lr: float
    crop: int
    flips: Flips
    seed: int
    image_scale: float | None = None
    recipe: str = "default"

    @property
    def interval(self) -> int:
        return math.ceil(self.steps / math.ceil(self.steps / _INTERVAL))

    @property
    def total_steps(self) -> int:
        return math.ceil(self.steps / self.interval) * self.interval


class _Closed(torch.optim.Optimizer):
    """An optimizer for a closure that takes the step itself.

    Lightning counts the steps of `optimizers().step(closure)`; the step itself is TrainingStep's, which may replay it.
    """

    def step(self, closure: Any = None) -> Any:
        return closure() if closure else super().step()


def _closed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_Closed, kind), {})
    return optimizer


class Stopped(Exception):
    """A person asked the run to stop; its state is saved."""


class Detector(L.LightningModule):
    """The network, its losses, its optimizer and its validation."""

    def __init__(self, start: Checkpoint, settings: TrainSettings) -> None:
        super().__init__()
        self.about, self.settings = replace(start, state_dict={}), settings
        self.recipe = recipe_named(settings.recipe)
        # A tenth faster on a CPU, too, than the default layout.
        self.model: Any = start.build().to(memory_format=torch.channels_last)
        self.metrics: dict[str, float] = {}
        self.automatic_optimization = False  # TrainingStep takes the steps

    def on_train_epoch_start(self) -> None:
        self.metrics = {}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the images go there by themselves; the targets are checked here first, which is free

    def on_train_start(self) -> None:
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        dtype = torch.bfloat16 if _has_bf16() else None
        weights = {"bbox_regression": self.recipe.box_weight}
        norm = self.recipe.gradient_norm
        self.take_step = TrainingStep(self.model, optimizer, max_grad_norm=norm, dtype=dtype, loss_weights=weights)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # The network's own randomness, too, must depend on the step alone, and not on what ran before it.
        torch.manual_seed(mixed_seed(self.settings.seed, self.global_step))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        images = [to_device(image, self.device).float() / 255 for image in images]
        losses: dict[str, Tensor] = self.optimizers().step(  # type: ignore[union-attr]
            lambda: self.take_step(images, targets)
        )
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return losses

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]  # norms and biases
        decay = self.recipe.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = _closed(self.recipe.optimizer(groups, lr=self.settings.lr))
        schedule = functools.partial(self.recipe.schedule, total=self.settings.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)}

    def on_validation_epoch_start(self) -> None:
        self._results: list[dict[str, Any]] = []
        self._image_ids: list[Any] = []
        self._losses: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Sample | ImageError, batch_idx: int) -> None:
        if isinstance(batch, ImageError):
            warnings.warn(f"{batch}; validation goes on without it", stacklevel=1)
            return
        image, target = batch
        image = to_device(image, self.device).float() / 255
        losses, (detections,) = self.model.losses_and_detections([image], [target])
        dataset = self.trainer.val_dataloaders.dataset.dataset  # type: ignore[union-attr]
        self._results += as_results(detections, target["image_id"], dataset.category_ids)
        self._image_ids.append(target["image_id"])
        self._losses.append(losses)

    def on_validation_epoch_end(self) -> None:
        dataset = self.trainer.val_dataloaders.dataset.dataset  # type: ignore[union-attr]
        if not self._losses:
            raise UserError(f"{dataset.folder}: not one validation image can be read")
        names = self._losses[0]
        means = {f"val_{name}": float(torch.stack([x[name] for x in self._losses]).mean()) for name in names}
        metrics = coco_metrics(dataset.coco, self._results, self._image_ids, self.model.detections_per_img)
        self.metrics = metrics | means


class Averaging(WeightAveraging):
    """A moving average that forgets the random start of the weights faster than its own memory is long.

    Lightning's, but for the update, in which torch would read the count of the updates from the device each step.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
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


class RunFiles(L.Callback):
    """Writes the run's files and moves its progress bar. Its place is after the averaging of the weights."""

    def __init__(self, folder: Path, record: TrainLog, progress: Progress) -> None:
        self.folder, self.record, self.progress = folder, record, progress
        self.late = LateLosses()
        self.stop = False
        self.best = -1.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        self.record.resume(trainer.global_step)
        self.task = self.progress.add_task("Training", total=module.settings.total_steps, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, Detector)
        files = [target["path"] for target in batch[1]]
        lr = module.settings.lr * module.recipe.schedule(trainer.global_step, total=module.settings.total_steps)
        self.late.add(outputs, functools.partial(self._note, trainer.global_step, lr, trainer.is_last_batch, files))
        self.progress.update(self.task, completed=trainer.global_step)
        if self.stop or trainer.is_last_batch:
            self.late.read()
        if self.stop and not trainer.is_last_batch:
            self._save(trainer)
            raise Stopped

    def _note(self, step: int, lr: float, last: bool, files: list[str], losses: dict[str, float]) -> None:
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite at step {step - 1} ({values}); its images: {', '.join(files)}. Look at their "
                "boxes, or lower --lr. The weights of the last interval are in the output folder"
            )
        self.record.add(step, losses, lr, last)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        line = f"step {trainer.global_step}/{module.settings.total_steps}  {self.record.recent()}"
        ap50 = module.metrics.get("AP50", -1.0)
        is_best = ap50 > self.best
        self.best = max(self.best, ap50)
        self._save(trainer)
        if is_best:
            shutil.copyfile(self.folder / "model.pt", self.folder / "best.pt")
        if module.metrics:
            self.record.add_validation(trainer.global_step, module.metrics)
            line += f"  validation AP50 {ap50:.3f}"
        self.record.plot()
        self.progress.console.print(line)
        if self.stop:
            raise Stopped

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, state: dict[str, Any]) -> None:
        assert isinstance(module, Detector)
        # A plain string, since weights_only=True reads no enum.
        state["settings"] = asdict(module.settings) | {"flips": module.settings.flips.value}
        # WeightAveraging has put the averaged weights here.
        weights = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
        checkpoint.save(replace(module.about, state_dict=weights, metrics=module.metrics), self.folder / "model.pt")

    def _save(self, trainer: L.Trainer) -> None:
        partial = self.folder / "last.ckpt.partial"
        trainer.save_checkpoint(partial)
        partial.replace(self.folder / "last.ckpt")


class StepSampler:
    """The keys of an interval's batches, from the step at which the run stands."""

    def __init__(self, module: Detector, length: int) -> None:
        self.module, self.length = module, length

    def __len__(self) -> int:
        return self.module.settings.interval

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        settings = self.module.settings
        first = self.module.global_step
        end = (first // settings.interval + 1) * settings.interval
        return batches(self.length, settings.batch_size, settings.seed, range(first, end))


def train(
    settings: TrainSettings,
    data: CocoDataset,
    validation: CocoDataset | None,
    start_from: Path | None,
    output: Path,
    resume: bool,
    workers: int,
    console: Console,
) -> Path:
    """Train a detector and return the file of its averaged weights.

    Args:
        settings: what decides the weights.
        data: the images to train on.
        validation: images to validate on, with the same class names, or None.
        start_from: a model file to start from, of the same builder; with other classes, its last layer starts anew.
        output: the folder of the run's files.
        resume: go on with the run in `output`.
        workers: processes that read and augment images.
        console: where progress is shown.

    Raises:
        UserError: if `output` holds a run and `resume` is not given or the reverse, if the settings of a resumed run
            differ, if the validation data has other classes, or if the loss is not finite.
        Stopped: after Ctrl-C, when everything is saved.

    Example::

        >>> settings = TrainSettings("retinanet_resnet18_fpn_lite", 100, 4, 2e-3, 256, Flips.NONE, seed=0)
        >>> train(settings, dataset, None, None, Path("runs/a"), False, 1, Console())  # doctest: +SKIP
        PosixPath('runs/a/model.pt')
    """
    last = output / "last.ckpt"
    if resume:
        _check_resume(last, settings)
    elif last.exists():
        raise UserError(f"{output} already holds a run: add --resume to go on with it, or choose another --output")
    if validation and validation.classes != data.classes:
        raise UserError(f"{validation.json_file} has the classes {validation.classes}, {data.json_file} {data.classes}")
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(settings.seed)
    module = Detector(_start(settings, data, start_from), settings)
    crop = settings.crop or (0 if settings.recipe == "default" else module.model.transform.max_size)
    training_set = TrainingSet(data, module.recipe.augmentation(crop, settings.flips), settings.seed)
    training_set[0, 0]  # complains here, and not in a worker, if no image can be read
    loader = DataLoader(
        training_set,
        batch_sampler=StepSampler(module, len(data)),
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )
    validation_loader = validation and DataLoader(
        Tried(validation), batch_size=None, collate_fn=plain, num_workers=workers, worker_init_fn=_ignore_interrupts
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, _quiet_lightning():
        files = RunFiles(output, TrainLog(output), progress)
        trainer = L.Trainer(
            max_epochs=settings.total_steps // settings.interval,
            devices=1,
            callbacks=[Averaging(module.recipe.average), files],
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with _stop_on_signal(files):
            trainer.fit(module, loader, validation_loader, ckpt_path=last if resume else None, weights_only=True)
    return output / "model.pt"


def _start(settings: TrainSettings, data: CocoDataset, start_from: Path | None) -> Checkpoint:
    """Random weights, or those of a model file; where its classes are others than the data's, with a new last layer."""
    other = checkpoint.load(start_from) if start_from else None
    if other and other.builder != settings.model:
        raise UserError(f"{start_from} is a {other.builder}: train it with --model {other.builder}")
    recipe = recipe_named(settings.recipe)
    if not settings.model.startswith(recipe.model):
        raise UserError(f"the recipe {settings.recipe} is for models {recipe.model}..., not {settings.model}")
    kwargs = (other.kwargs if other else {}) | dict(recipe.kwargs)
    if settings.crop and settings.recipe != "default":  # published detectors see images of the size of their crops
        kwargs = kwargs | {"min_size": settings.crop, "max_size": settings.crop}
    if settings.image_scale is not None:
        kwargs = kwargs | {"min_size": None, "image_scale": settings.image_scale, "_skip_resize": True}
    weights = checkpoint.build(settings.model, len(data.classes), **kwargs).state_dict()
    if other:
        same = other.classes == data.classes
        weights |= {name: value for name, value in other.state_dict.items() if same or "cls_logits" not in name}
    return Checkpoint(settings.model, kwargs, data.classes, data.category_ids, weights)


def _check_resume(last: Path, settings: TrainSettings) -> None:
    if not last.exists():
        raise UserError(f"there is no run to resume in {last.parent}: it has no {last.name}")
    state = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    before = asdict(TrainSettings(**state["settings"]))  # runs of earlier versions lack the latest settings
    for name, value in asdict(settings).items():
        if before[name] != value:
            raise UserError(f"the run in {last.parent} has {name} {before[name]}, not {value}: give it the same")


def _collate(samples: list[Sample]) -> Batch:
    images, targets = zip(*map(plain, samples), strict=True)
    return list(images), list(targets)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it announces devices, and products
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    logger.setLevel(level)


@contextlib.contextmanager
def _stop_on_signal(files: RunFiles) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step under way; a second one ends it at once."""

    def stop(number: int, frame: Any) -> None:
        files.stop = True
        files.progress.console.print("Stopping after this step")
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the main one decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Training on a COCO data set, with Lightning: `retina-fast train`.

One Lightning epoch is an interval of at most 500 steps. At its end the averaged weights are validated and the run's
files are written:

    last.ckpt             everything that --resume needs
    step-N.ckpt           the newest of those before it, with --keep 2 or more
    model.pt              the averaged weights, for evaluate and detect
    best.pt               those with the best AP50 in validation, if there is validation data
    log.csv, tensorboard/ step, losses, learning rate, images a second, validation
    loss.png              the curves
    precision_recall.png  of the last validation

A run that is stopped, at any moment, and resumed with the same settings ends with the same bits as one that is not: all
randomness comes from the seed and the step. (On another number of threads or processes, sums round otherwise.)

Several processes, see `processes`, share the images of each step: the batch of a step is the same for any number of
them. Gradients and losses are means over the processes, and norms count the whole batch.
"""

import contextlib
import logging
import signal
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.augment import TrainingSet, batches
from retina_fast.data.coco import CocoDataset, Sample, Tried, plain
from retina_fast.data.errors import UserError
from retina_fast.data.processes import ALONE, Processes
from retina_fast.train.detector import Averaging, Batch, Detector
from retina_fast.train.log import TrainLog
from retina_fast.train.recipes import recipe_named
from retina_fast.train.run_files import RunFiles, WholeFiles, signals_restored
from retina_fast.train.settings import TrainSettings, check_resume


class StepSampler:
    """The keys of this process's part of an interval's batches, from the step at which the run stands."""

    def __init__(self, module: Detector, data: CocoDataset) -> None:
        self.module, self.length, self.aspects = module, len(data), data.aspects()

    def __len__(self) -> int:
        return self.module.settings.interval

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        settings, processes = self.module.settings, self.module.processes
        first = self.module.global_step
        end = (first // settings.interval + 1) * settings.interval
        share, alike = settings.share(processes.count), self.module.recipe.alike
        for keys in batches(self.length, settings.batch_size, settings.seed, range(first, end), self.aspects, alike):
            yield keys[processes.rank * share :][:share]


class _Joined(DDPStrategy):
    """Lightning's for several processes; but it is TrainingStep that is given the network that exchanges gradients."""

    def configure_ddp(self) -> None:
        pass


def train(
    settings: TrainSettings,
    data: CocoDataset,
    validation: CocoDataset | None,
    start_from: Path | None,
    output: Path,
    resume: bool,
    workers: int,
    console: Console,
    processes: Processes = ALONE,
    keep: int = 1,
) -> Path:
    """Train a detector and return the file of its averaged weights.

    Args:
        settings: what decides the weights.
        data: the images to train on.
        validation: images to validate on, with the same class names, or None.
        start_from: a model file to start from, of the same builder; with other classes, its last layer starts anew.
        output: the folder of the run's files, the same one for all processes.
        resume: go on with the run in `output`, on as many processes as there are now.
        workers: processes that read and augment images, of each process that trains.
        console: where progress is shown.
        processes: those that train together.
        keep: how many of the newest checkpoints stay.

    Raises:
        UserError: if `output` holds a run and `resume` is not given or the reverse, if the settings or the annotations
            of a resumed run differ, if the validation data has other classes, if the batch cannot be shared evenly, if
            a file cannot be written, or if the loss is not finite.
        Stopped: after Ctrl-C or SIGTERM, when everything is saved.

    Example::

        >>> from retina_fast.data.augment import Flips
        >>> settings = TrainSettings("retinanet_resnet18_fpn_lite", 100, 4, 2e-3, 256, Flips.NONE, seed=0)
        >>> train(settings, dataset, None, None, Path("runs/a"), False, 1, Console())  # doctest: +SKIP
        PosixPath('runs/a/model.pt')
    """
    settings.share(processes.count)
    last = output / "last.ckpt"
    kwargs = check_resume(last, settings, data) if resume else None
    if not resume and last.exists():
        raise UserError(f"{output} already holds a run: add --resume to go on with it, or choose another --output")
    if validation and validation.classes != data.classes:
        raise UserError(f"{validation.json_file} has the classes {validation.classes}, {data.json_file} {data.classes}")

    torch.manual_seed(settings.seed)
    module = Detector(_start(settings, data, start_from, kwargs), settings, processes)
    crop = settings.crop or (module.model.transform.max_size if module.recipe.crops_are_the_size else 0)
    training_set = TrainingSet(data, module.recipe.augmentation(crop, settings.flips), settings.seed)
    training_set[0, 0]  # complains here, and not in a worker, if no image can be read
    output.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(
        training_set,
        batch_sampler=StepSampler(module, data),
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )
    validation_loader = validation and DataLoader(
        Tried(validation),
        sampler=processes.share(len(validation)),
        batch_size=None,
        collate_fn=plain,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    several: dict[str, Any] = {}
    if processes.count > 1:
        machines = processes.count // processes.local_count
        several = {"strategy": _Joined(), "num_nodes": machines, "use_distributed_sampler": False}
    with Progress(*columns, console=console) as progress, _quiet_lightning(), signals_restored():
        trainer = L.Trainer(
            max_epochs=settings.total_steps // settings.interval,
            devices=processes.local_count,
            plugins=[WholeFiles(), *([processes.environment] if several else [])],
            callbacks=[Averaging(module.recipe.average), RunFiles(output, TrainLog(output), progress, keep)],
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **several,
        )
        trainer.fit(module, loader, validation_loader, ckpt_path=last if resume else None, weights_only=True)
    return output / "model.pt"


def _start(
    settings: TrainSettings, data: CocoDataset, start_from: Path | None, resumed: dict[str, Any] | None = None
) -> Checkpoint:
    """Random weights, with the backbone's published ones if there are; or those of a model file, where its classes are
    others than the data's with a new last layer. A run that is resumed has its own, and its builder's arguments."""
    if resumed is not None:
        weights = checkpoint.build(settings.model, len(data.classes), fetch=False, **resumed).state_dict()
        return Checkpoint(settings.model, resumed, data.classes, data.category_ids, weights)
    other = checkpoint.load(start_from) if start_from else None
    if other and other.builder != settings.model:
        raise UserError(f"{start_from} is a {other.builder}: train it with --model {other.builder}")
    recipe = recipe_named(settings.recipe)
    if not fnmatchcase(settings.model, recipe.model):
        raise UserError(f"the recipe {settings.recipe} is for models {recipe.model}, not {settings.model}")
    kwargs = (other.kwargs if other else {}) | dict(recipe.kwargs)
    if settings.crop and recipe.crops_are_the_size:
        kwargs |= {"min_size": settings.crop, "max_size": settings.crop}
    if settings.image_scale is not None:
        kwargs |= {"min_size": None, "image_scale": settings.image_scale, "_skip_resize": settings.crop > 0}
    if settings.weights_backbone:
        kwargs |= {"weights_backbone": settings.weights_backbone}
    weights = checkpoint.build(settings.model, len(data.classes), fetch=other is None, **kwargs).state_dict()
    if other:
        same = other.classes == data.classes
        weights |= {name: value for name, value in other.state_dict.items() if same or "cls_logits" not in name}
    return Checkpoint(settings.model, kwargs, data.classes, data.category_ids, weights)


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


def _ignore_signals(worker: int) -> None:
    # Ctrl-C, or torchrun's SIGTERM, reaches every process; the main one decides when the workers end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

"""Training on a COCO data set, with Lightning.

One Lightning epoch is an interval of at most 500 steps. At its end the averaged weights are validated and the run's
files are written:

    last.ckpt             everything that --resume needs
    step-N.ckpt           the newest of these, last.ckpt included, with --keep 2 or more
    model.pt              the averaged weights, for evaluate and detect
    best.pt               those with the best AP50 in validation, if there is validation data
    log.csv, tensorboard/ step, losses, learning rate, images a second, validation
    loss.png              the curves
    precision_recall.png  of the last validation

A run that is stopped at any moment and resumed with the same settings ends with the same bits as a run that was not
stopped, since everything random comes from the seed and the step. With another number of threads or processes, sums are
rounded differently.

Several processes (see `retina_fast.data.processes`) share the images of each step: the batch of a step is the same for
any number of them. Gradients and losses are means over the processes, and BatchNorms count the whole batch.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.processes import ALONE, WORKERS, Processes
from retina_fast.train.averaging import Averaging
from retina_fast.train.detector import Detector
from retina_fast.train.few_values import warn_of_few_values
from retina_fast.train.loaders import crop_of, training_loader, validation_loader
from retina_fast.train.log import TrainLog
from retina_fast.train.recipes import recipe_named
from retina_fast.train.resume import check_new_run, check_resume, set_aside
from retina_fast.train.run_files import RunFiles, WholeFiles
from retina_fast.train.settings import TrainSettings
from retina_fast.train.start import starting_network
from retina_fast.train.stopping import StopRequest


def train(
    settings: TrainSettings,
    data: CocoDataset,
    *,
    validation: CocoDataset | None = None,
    start_from: str | Path | None = None,
    output: str | Path = "runs/train",
    resume: bool = False,
    keep: int = 1,
    workers: int = WORKERS,
    console: Console | None = None,
    processes: Processes = ALONE,
    callbacks: Sequence[L.Callback] = (),
) -> Path:
    """Train a detector and return the file of its averaged weights.

    Args:
        settings: what decides the weights. What is left at None is filled in, see :meth:`TrainSettings.resolve`.
        data: the images to train on.
        validation: images to validate on, with the same class names.
        start_from: a model file of the same model to start from; with other classes, its last layer starts anew.
        output: the folder of the run's files, the same one for all processes.
        resume: go on with the run in `output`, on as many processes as there are now.
        keep: how many of the newest checkpoints stay.
        workers: how many processes read and augment images, for each process that trains.
        console: where progress is shown; nowhere by default.
        processes: those that train together.
        callbacks: more of Lightning's, which come after those that write the run's files.

    Raises:
        UserError: if `output` holds a run and `resume` is not given or the reverse, if the settings or the annotations
            of a resumed run differ, if the validation data has other classes, if the batch cannot be shared evenly, if
            a file cannot be written, or if the loss is not finite.
        Stopped: after Ctrl-C or SIGTERM, when everything is saved.

    Example::

        # Fine-tune on data of one's own: a COCO file and the folder of its images, or a Pascal VOC folder.
        >>> from rich.console import Console
        >>> from retina_fast.data.voc import open_data
        >>> from retina_fast.predict.load import load_model
        >>> from retina_fast.train import TrainSettings, train

        >>> data = open_data("cells/train.json", "cells/train")  # doctest: +SKIP
        >>> validation = open_data("cells/val.json", "cells/val", data.classes)  # doctest: +SKIP
        >>> settings = TrainSettings(
        ...     "retinanet_resnet50_fpn_v2", steps=2000, batch_size=8, weights_backbone="IMAGENET1K_V2"
        ... )
        >>> file = train(
        ...     settings.resolve(data), data, validation=validation, output="runs/cells", console=Console()
        ... )  # doctest: +SKIP
        >>> model, about = load_model(file)  # doctest: +SKIP
    """
    settings, output, console = settings.resolve(data), Path(output), console or Console(quiet=True)
    settings.share(processes.count)
    recipe, listed = recipe_named(settings.recipe), len(data)
    data = recipe.images_of(data)
    if recipe.only_objects:
        console.print(f"{listed - len(data)} of {listed} images have no object: the recipe leaves them out")
    last = output / "last.ckpt"
    resumed = check_resume(last, settings, data) if resume else None
    if not resume:
        check_new_run(output)
    if validation and validation.classes != data.classes:
        raise UserError(f"{validation.json_file} has the classes {validation.classes}, {data.json_file} {data.classes}")

    torch.manual_seed(settings.seed)
    network, about = starting_network(settings, data, start_from, resumed)
    if processes.first:
        warn_of_few_values(network, settings, data, crop_of(settings, network))
    module = Detector(network, about, settings, processes)
    loader = training_loader(module, data, workers)
    if not resume and processes.first:
        set_aside(output)
    with _progress_bar(console) as progress, StopRequest(progress.console.print) as stop, _quiet_lightning():
        trainer = L.Trainer(
            max_epochs=settings.total_steps // settings.interval,
            callbacks=[
                Averaging(module.recipe.average),
                RunFiles(output, TrainLog(output), progress, stop, keep),
                *callbacks,
            ],
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **_several(processes),
        )
        validated = validation and validation_loader(module, validation, workers)
        trainer.fit(module, loader, validated, ckpt_path=last if resume else None, weights_only=True)
    return output / "model.pt"


class _DDPStrategy(DDPStrategy):
    """Lightning's strategy for several processes, which here does not wrap the module.

    The module gives TrainingStep a network in DistributedDataParallel.
    """

    def configure_ddp(self) -> None:
        pass


def _several(processes: Processes) -> dict[str, Any]:
    """The Trainer's arguments that depend on the number of processes."""
    if processes.count == 1:
        return {"devices": 1, "plugins": [WholeFiles()]}
    return {
        "devices": processes.local_count,
        "num_nodes": processes.count // processes.local_count,
        "plugins": [WholeFiles(), processes.environment],
        "strategy": _DDPStrategy(),
        "use_distributed_sampler": False,
    }


def _progress_bar(console: Console) -> Progress:
    """A bar of the steps with a field `pace`, the images a second."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences Lightning's warnings, and its log of devices and products."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    logger.setLevel(level)

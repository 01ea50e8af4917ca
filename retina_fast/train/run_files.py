"""What a training run leaves on the disk and shows while it runs: checkpoints, record, progress bar."""

import contextlib
import functools
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.progress import Progress

from retina_fast import checkpoint
from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.data.precision_recall import plot_precision_recall
from retina_fast.train.detector import Batch, Detector
from retina_fast.train.late_losses import LateLosses
from retina_fast.train.log import TrainLog
from retina_fast.train.settings import fingerprint

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A person asked the run to stop; its state is saved."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)


class Pace:
    """Images a second since the interval began, and the part of that time spent waiting for images.

    Example::

        >>> pace = Pace(images=16)
        >>> pace.begin(now=0.0), pace.step_begins(now=1.0), pace.step_ends(now=4.0)
        (None, None, None)
        >>> pace.images_per_second, pace.waiting
        (4.0, 0.25)
    """

    def __init__(self, images: int) -> None:
        self.images = images  # a step
        self.begin()

    def begin(self, now: float | None = None) -> None:
        """Without what came before: a validation, say."""
        self.start = self.last = time.monotonic() if now is None else now
        self.steps, self.waited = 0, 0.0

    def step_begins(self, now: float | None = None) -> None:
        self.waited += (time.monotonic() if now is None else now) - self.last

    def step_ends(self, now: float | None = None) -> None:
        self.last = time.monotonic() if now is None else now
        self.steps += 1

    @property
    def images_per_second(self) -> float:
        return self.steps * self.images / max(self.last - self.start, 1e-9)

    @property
    def waiting(self) -> float:
        return self.waited / max(self.last - self.start, 1e-9)


class RunFiles(L.Callback):
    """Writes the run's files and moves its progress bar. Its place is after the averaging of the weights.

    last.ckpt, from which a run goes on, is the last file of an interval: what ends in between writes them all again.
    """

    def __init__(self, folder: Path, record: TrainLog, progress: Progress, keep: int) -> None:
        self.folder, self.record, self.progress, self.keep = folder, record, progress, keep
        self.late = LateLosses()
        self.stop = False
        self.best = -1.0
        self.improved = False  # and not written yet

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        for number in _SIGNALS:  # only now, since Lightning has handlers of its own
            signal.signal(number, self._stop_after_this_step)
        self.data = fingerprint(trainer.train_dataloader.dataset.dataset)  # type: ignore[union-attr]
        if module.processes.first:
            self.record.resume(trainer.global_step)
        total = module.settings.total_steps
        self.task = self.progress.add_task("Training", total=total, completed=trainer.global_step, pace="")
        self.pace = Pace(module.settings.batch_size)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.pace.begin()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self.pace.step_begins()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, Detector)
        files = [target["path"] for target in batch[1]]
        lr = module.settings.lr * module.recipe.schedule(trainer.global_step, total=module.settings.total_steps)
        note = functools.partial(self._note, module, trainer.global_step, lr, trainer.is_last_batch, files)
        self.late.add(outputs, note)
        stop = module.processes.any(self.stop)
        if stop or trainer.is_last_batch:
            self.late.read()
        self.pace.step_ends()
        pace = f"{self.pace.images_per_second:.3g} images/s"
        self.progress.update(self.task, completed=trainer.global_step, pace=pace)
        if stop and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise Stopped

    def _note(
        self, module: Detector, step: int, lr: float, last: bool, files: list[str], losses: dict[str, float]
    ) -> None:
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite at step {step - 1} ({values}); its images: {', '.join(files)}. Look at their "
                "boxes, lower --lr, or try --no-bf16. The weights of the last interval are in the output folder"
            )
        losses = module.processes.mean(losses)
        if module.processes.first:
            pace = {"images_per_second": self.pace.images_per_second, "waiting": self.pace.waiting}
            self.record.add(step, losses, {"lr": lr, **pace}, last)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        stop = module.processes.any(self.stop)
        if module.processes.first:
            self._write_interval(trainer, module)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if module.processes.first:
            self._keep_some(trainer.global_step)
        if stop:
            raise Stopped

    def _write_interval(self, trainer: L.Trainer, module: Detector) -> None:
        line = f"step {trainer.global_step}/{module.settings.total_steps}  {self.record.recent()}"
        if module.validated:
            self.record.add_validation(trainer.global_step, module.metrics)
            plot_precision_recall(module.validated, self.folder / "precision_recall.png")
            line += f"  validation AP50 {module.metrics['AP50']:.3f}"
        if module.metrics.get("AP50", -1.0) > self.best:
            self.best = module.metrics["AP50"]
            self.improved = True
        self.record.plot()
        self.progress.console.print(line)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, state: dict[str, Any]) -> None:
        assert isinstance(module, Detector)
        # A plain string, since weights_only=True reads no enum.
        state["settings"] = asdict(module.settings) | {"flips": module.settings.flips.value}
        state["kwargs"] = module.about.kwargs
        state["data"] = self.data
        if not module.processes.first:
            return
        # WeightAveraging has put the averaged weights here.
        weights = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
        model = self.folder / "model.pt"
        checkpoint.save(replace(module.about, state_dict=weights, metrics=module.metrics), model)
        if self.improved:
            with replacing(self.folder / "best.pt") as partial:
                shutil.copyfile(model, partial)
            self.improved = False

    def _keep_some(self, step: int) -> None:
        """Beside last.ckpt, the newest `keep` - 1 of those before it stay; as step-N.ckpt, which is a second name."""
        name = self.folder / f"step-{step:08}.ckpt"
        if self.keep > 1:
            name.unlink(missing_ok=True)
            try:
                os.link(self.folder / "last.ckpt", name)
            except OSError:  # a file system without second names
                with replacing(name) as partial:
                    shutil.copyfile(self.folder / "last.ckpt", partial)
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep if self.keep > 1 else None]:
            old.unlink()

    def _stop_after_this_step(self, number: int, frame: Any) -> None:
        self.stop = True
        self.progress.console.print("Stopping after this step")
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Puts back the handlers that `RunFiles` replaces: the first Ctrl-C ends a run after the step under way."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

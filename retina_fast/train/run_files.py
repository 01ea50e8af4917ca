"""The files of a training run, which a Lightning callback writes, and the progress that it shows."""

import functools
import math
import os
import shutil
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
from retina_fast.data.metrics import plot_precision_recall
from retina_fast.train.detector import Batch, Detector
from retina_fast.train.late_losses import LateLosses
from retina_fast.train.log import TrainLog
from retina_fast.train.pace import Pace
from retina_fast.train.resume import fingerprint
from retina_fast.train.stopping import Stopped, StopRequest


class WholeFiles(TorchCheckpointIO):
    """Writes Lightning's checkpoints so that each takes the place of the old one only when it is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)


class RunFiles(L.Callback):
    """Writes the run's files and moves its progress bar. It comes after the averaging of the weights.

    last.ckpt, from which a run goes on, is the last file that is written at the end of an interval: a run that ends
    while they are being written writes all of them again.

    Args:
        folder: of the files.
        record: of the losses and metrics.
        progress: the bar, with a field `pace`.
        stop: whether a person has asked the run to stop.
        keep: how many of the newest checkpoints stay.

    Example::

        >>> L.Trainer(callbacks=[averaging, RunFiles(folder, TrainLog(folder), progress, stop, 1)])  # doctest: +SKIP
    """

    def __init__(self, folder: Path, record: TrainLog, progress: Progress, stop: StopRequest, keep: int) -> None:
        self.folder, self.record, self.progress, self.stop, self.keep = folder, record, progress, stop, keep
        self.late = LateLosses()
        self.best = -1.0
        self.improved = False  # whether the best model so far is still to be written

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        self.stop.listen()
        self.data = fingerprint(trainer.train_dataloader.dataset.dataset)  # pyrefly: ignore[missing-attribute]
        if module.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self.record.resume(trainer.global_step)
        total = module.settings.total_steps
        self.task = self.progress.add_task("Training", total=total, completed=trainer.global_step, pace="")
        self.pace = Pace(module.settings.batch_size)

    def _remove_unfinished(self) -> None:
        """Removes what a process that was killed had begun to write, see `retina_fast.data.files`."""
        for name in ("last.ckpt", "step-*.ckpt", "model.pt", "best.pt", "log.csv"):
            for unfinished in self.folder.glob(f"{name}.[0-9]*.partial"):
                unfinished.unlink()

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
        note = functools.partial(self._log_losses, module, trainer.global_step, lr, trainer.is_last_batch, files)
        self.late.add(outputs, note)
        stop = module.processes.any(self.stop.asked)
        if stop or trainer.is_last_batch:
            self.late.read()
        self.pace.step_ends()
        pace = f"{self.pace.images_per_second:.3g} images/s"
        self.progress.update(self.task, completed=trainer.global_step, pace=pace)
        if stop and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise Stopped

    def _log_losses(
        self, module: Detector, step: int, lr: float, last: bool, files: list[str], losses: dict[str, float]
    ) -> None:
        """Logs a step's losses, means over the processes. Raises a UserError if they are not finite."""
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            saved = (self.folder / "last.ckpt").exists()
            kept = "The weights of the last interval are" if saved else "No interval was over, so no weights are"
            raise UserError(
                f"the loss is not finite at step {step - 1} ({values}); its images: {', '.join(files)}. Look at their "
                f"boxes, lower --lr, or try --no-bf16. {kept} in the output folder"
            )
        losses = module.processes.mean(losses)
        if module.processes.first:
            pace = {"images_per_second": self.pace.images_per_second, "waiting": self.pace.waiting}
            self.record.add(step, losses, {"lr": lr, **pace}, last)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Detector)
        stop = module.processes.any(self.stop.asked)
        if module.processes.first:
            self._write_interval(trainer, module)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if module.processes.first:
            self._keep_newest(trainer.global_step)
        if stop:
            raise Stopped

    def _write_interval(self, trainer: L.Trainer, module: Detector) -> None:
        """Writes the validation into the log, draws the curves, and prints a line."""
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
        # The flips are a plain string, since torch.load(weights_only=True) reads no enum.
        state["settings"] = asdict(module.settings) | {"flips": module.settings.flips.value}
        state["kwargs"] = module.about.kwargs
        state["data"] = self.data
        if not module.processes.first:
            return
        # WeightAveraging has put the averaged weights into the state.
        weights = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
        model = self.folder / "model.pt"
        checkpoint.save(replace(module.about, state_dict=weights, metrics=module.metrics), model)
        if self.improved:
            with replacing(self.folder / "best.pt") as partial:
                shutil.copyfile(model, partial)
            self.improved = False

    def _keep_newest(self, step: int) -> None:
        """Gives last.ckpt the second name step-N.ckpt, and removes all but the newest `keep` of these."""
        name = self.folder / f"step-{step:08}.ckpt"
        if self.keep > 1:
            name.unlink(missing_ok=True)
            try:
                os.link(self.folder / "last.ckpt", name)
            except OSError:  # The file system has no second names.
                with replacing(name) as partial:
                    shutil.copyfile(self.folder / "last.ckpt", partial)
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep if self.keep > 1 else None]:
            old.unlink()

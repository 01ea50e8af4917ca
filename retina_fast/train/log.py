"""The log of a training run: log.csv, loss.png, and the same figures for TensorBoard."""

import csv
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from retina_fast.data.files import replacing
from retina_fast.data.outputs import save_plot

_EVERY = 20  # steps a row, since the loss of a single step is noisy
_COLUMNS = ("step", "classification", "bbox_regression", "lr", "images_per_second", "waiting")
_VALIDATION_COLUMNS = ("val_classification", "val_bbox_regression", "AP", "AP50")


class TrainLog:
    """Writes log.csv, whose rows are the mean losses of 20 steps or the validation at a step.

    `images_per_second` is the rate of all processes since the interval began, without validation; `waiting` is the part
    of that time in which the steps waited for images.

    Args:
        folder: of the run's files.

    Example::

        >>> log = TrainLog(Path("runs/a"))  # doctest: +SKIP
        >>> log.add(1, {"classification": 1.1, "bbox_regression": 0.6}, {"lr": 1e-3}, last=False)  # doctest: +SKIP
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self.window: list[dict[str, float]] = []

    def resume(self, step: int) -> None:
        """Start the file; or, after `step`, go on with it without its later rows, which will be written again."""
        file = self.folder / "log.csv"
        if step and file.exists():
            whole, _, _ = file.read_text().rpartition("\n")  # A run that was killed may have left half a row.
            rows = [
                {k: float(v) for k, v in row.items() if v} | {"step": int(row["step"])}
                for row in csv.DictReader(whole.splitlines())
            ]
            self.rows = [row for row in rows if row["step"] <= step]
        with replacing(file) as partial, partial.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, _COLUMNS + _VALIDATION_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, losses: dict[str, float], rates: dict[str, float], last: bool) -> None:
        """Add one step's losses.

        Args:
            step: its number, from 1.
            losses: by name.
            rates: the other columns of its row: the learning rate and the pace.
            last: whether it is the last step of an interval, which ends a row.
        """
        self.window.append(losses)
        if step % _EVERY == 0 or last:
            means = {name: fmean(x[name] for x in self.window) for name in losses}
            self._write({"step": step, **means, **rates})
            self.window = []

    def add_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Add a validation's losses and metrics."""
        self._write({"step": step} | {name: metrics[name] for name in _VALIDATION_COLUMNS})

    def recent(self) -> str:
        """The mean losses of the last 100 steps, in words."""
        rows = [row for row in self.rows if "lr" in row][-100 // _EVERY :]
        names = [name for name in ("classification", "bbox_regression") if rows]
        return "  ".join(f"{name} {fmean(row[name] for row in rows):.3f}" for name in names)

    def plot(self) -> None:
        """Draw loss.png."""
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        for name in ("classification", "bbox_regression", "val_classification", "val_bbox_regression"):
            rows = [row for row in self.rows if name in row]
            if rows:
                style = "o--" if name.startswith("val_") else "-"
                axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=name)
        validated = [row for row in self.rows if "AP50" in row]
        if validated:
            right = axes.twinx()
            right.set(ylabel="validation AP50", ylim=(0, 1))
            right.plot([row["step"] for row in validated], [row["AP50"] for row in validated], "k.-", label="AP50")
        top, lines = (right, [*axes.lines, *right.lines]) if validated else (axes, list(axes.lines))
        if lines:
            top.legend(handles=lines)
        save_plot(figure, self.folder / "loss.png")

    def _write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        with (self.folder / "log.csv").open("a", newline="") as lines:
            csv.DictWriter(lines, _COLUMNS + _VALIDATION_COLUMNS).writerow(row)
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, int(row["step"]))
        self.board.flush()

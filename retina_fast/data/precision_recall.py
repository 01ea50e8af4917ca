"""Precision over recall, drawn."""

from pathlib import Path

from matplotlib.figure import Figure

from retina_fast.data.metrics import RECALLS, CocoMetrics


def plot_precision_recall(found: CocoMetrics, file: Path) -> None:
    """Draw the curves of `found`, each with its average precision.

    Example::

        >>> plot_precision_recall(evaluation.metrics, Path("precision_recall.png"))  # doctest: +SKIP
    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for name, precision in found.precision.items():
        axes.plot(RECALLS, precision, label=f"{name}, AP {sum(precision) / len(precision):.3f}")
    if axes.lines:
        axes.legend()
    axes.set_title("mean over the classes")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)

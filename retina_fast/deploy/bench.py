"""How fast a model is on this machine: `retina-fast bench`.

torchvision, the drop-in model and the engine, and if asked for other runtimes, take turns on the same images with the
same weights, from uint8 images on the device to detections.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from retina_fast.convert import torchvision_detector
from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.data.outputs import check_folder, save_plot
from retina_fast.deploy.bench_runtimes import other_runtimes
from retina_fast.deploy.engine import Engine, compile_inference
from retina_fast.deploy.onnx_network import PAUSE

TORCHVISION = "torchvision"


@dataclass
class Speed:
    """What one of the contestants took for a batch."""

    name: str
    batch: int
    ms: float
    """Median over the rounds."""

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.ms


def contestants(model: Any, images: Sequence[Tensor]) -> tuple[dict[str, Callable[[list[Tensor]], Any]], Engine]:
    """The functions to be timed, by name, and the engine itself; each takes a list of uint8 images (3, H, W).

    Args:
        model: a RetinaNet in evaluation mode.
        images: some, on which the engine's difference is measured.

    Example::

        >>> runs, engine = contestants(model, images)  # doctest: +SKIP
    """
    engine = compile_inference(model, images)
    dtype = engine.report.dtype
    theirs = torchvision_detector(model)
    device = next(model.parameters()).device

    def floats(images: list[Tensor]) -> list[Tensor]:
        return [image.float() / 255 for image in images]

    def autocast(images: list[Tensor]) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return theirs(floats(images))

    runs: dict[str, Callable[[list[Tensor]], Any]] = {TORCHVISION: lambda images: theirs(floats(images))}
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        runs[f"{TORCHVISION}, {name}"] = autocast
    runs["model"] = lambda images: model(floats(images))
    if dtype != torch.float32:
        runs["engine, float32"] = compile_inference(model, dtype=torch.float32)
    runs[f"engine, {name}"] = engine
    return runs, engine


@torch.no_grad()
def measure(
    runs: dict[str, Callable[[list[Tensor]], Any]], images: Sequence[Tensor], batches: Sequence[int], rounds: int,
    console: Console,
) -> list[Speed]:  # fmt: skip
    """The speed of every contestant at every batch size; in each round they take turns, on a CPU with pauses.

    Args:
        runs: from :func:`contestants`.
        images: uint8, on the device; batches are filled with them in turn.
        batches: the batch sizes.
        rounds: how many are timed, after one that is not.
        console: where the progress bar is shown.

    Example::

        >>> measure(runs, images, batches=[1, 2], rounds=5, console=Console())  # doctest: +SKIP
    """
    speeds = []
    for batch in track(batches, "Measuring", console=console, transient=True):
        given = [images[i % len(images)] for i in range(batch)]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                if images[0].device.type == "cpu":  # a GPU left idle would lower its clock
                    time.sleep(PAUSE)
                start = time.perf_counter()
                found = run(given)
                float(found[-1]["scores"].sum())  # waits for the device
                seconds[name].append(time.perf_counter() - start)
        speeds += [Speed(name, batch, 1000 * statistics.median(times[1:])) for name, times in seconds.items()]
    return speeds


def machine(device: torch.device) -> str:
    """The device in words.

    Example::

        >>> machine(torch.device("cpu")).startswith("CPU with")
        True
    """
    threads = f"CPU with {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return f"{name}, torch {torch.__version__}"


def report(speeds: Sequence[Speed], title: str, console: Console) -> None:
    """Print a table: a row a contestant and batch size.

    Example::

        >>> report([Speed("torchvision", 1, 500.0)], "a machine", Console())  # doctest: +SKIP
    """
    slow = {speed.batch: speed.ms for speed in speeds if speed.name == TORCHVISION}
    last = {speed.batch: speed.name for speed in speeds}
    table = Table("batch", "", title=Text(title), title_justify="left")
    for heading in ("ms a batch", "images/s", "times torchvision"):
        table.add_column(heading, justify="right")
    for speed in speeds:
        ratio = slow[speed.batch] / speed.ms
        row = f"{speed.ms:.1f}", f"{speed.images_per_second:.1f}", f"{ratio:.2f}"
        table.add_row(str(speed.batch), speed.name, *row, end_section=speed.name == last[speed.batch])
    console.print(table)


def _check_output(output: Path) -> None:
    """Raises a UserError if the folder cannot be written into, or has files of these names from anywhere else."""
    names = ("bench.png", "bench.json")
    check_folder(output, names)
    try:
        ours = "speeds" in json.loads((output / "bench.json").read_text())
    except (OSError, ValueError, TypeError):
        ours = False
    for name in names:
        if not ours and (output / name).exists():
            raise UserError(f"{output / name}: is of no earlier bench; give another folder as --output")


def plot(speeds: Sequence[Speed], title: str, path: Path) -> None:
    """Draw images a second and milliseconds a batch over the batch size.

    Example::

        >>> plot(speeds, "a machine", Path("bench.png"))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    names = list(dict.fromkeys(speed.name for speed in speeds))
    batches = sorted({speed.batch for speed in speeds})
    for name in names:
        of_name = [speed for speed in speeds if speed.name == name]
        style: dict[str, Any] = {"marker": "o", "label": name, "linestyle": "--" if TORCHVISION in name else "-"}
        throughput.plot([speed.batch for speed in of_name], [speed.images_per_second for speed in of_name], **style)
        latency.plot([speed.batch for speed in of_name], [speed.ms for speed in of_name], **style)
    for axes, label in ((throughput, "images a second"), (latency, "ms a batch")):
        axes.set(xlabel="images a batch", ylabel=label, ylim=(0, None), xticks=batches)
        axes.grid(alpha=0.3)
    figure.legend(*throughput.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a file's name may hold dollar signs
    save_plot(figure, path, dpi=120)


def bench(
    model: Any, images: Sequence[Tensor], batches: Sequence[int], rounds: int, output: Path, name: str,
    console: Console, others: bool = False,
) -> list[Speed]:  # fmt: skip
    """Measure, print the table and the engine's own report, and write bench.png and bench.json into `output`.

    Args:
        model: a RetinaNet in evaluation mode.
        images: uint8 (3, H, W), on the model's device.
        batches: the batch sizes.
        rounds: medians are over so many.
        output: a folder, made if need be.
        name: of the model, for the title.
        console: where the table is printed.
        others: whether to measure the runtimes of :mod:`retina_fast.deploy.bench_runtimes`, too.

    Raises:
        UserError: if the output cannot be written.

    Example::

        >>> bench(model, [torch.zeros(3, 512, 512, dtype=torch.uint8)], [1], 5, Path("out"), "trees", Console())
        ... # doctest: +SKIP
    """
    _check_output(output)
    runs, engine = contestants(model, images)
    if others:
        runs |= other_runtimes(model, images, lambda text: console.print(text, highlight=False, markup=False))
    speeds = measure(runs, images, batches, rounds, console)
    sizes = ", ".join(sorted({f"{image.shape[1]}x{image.shape[2]}" for image in images}))
    title = f"{name}, images of {sizes}; {machine(images[0].device)}"
    report(speeds, title, console)
    console.print(str(engine), highlight=False, markup=False)
    output.mkdir(parents=True, exist_ok=True)
    plot(speeds, title, output / "bench.png")
    rows = [asdict(speed) | {"images_per_second": speed.images_per_second} for speed in speeds]
    content = {"title": title, "engine": str(engine).splitlines(), "speeds": rows}
    with replacing(output / "bench.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    return speeds

"""The command line: `retina-fast train`, `evaluate` and `detect`."""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch

from retina_fast.commands.processes import joined
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.errors import UserError

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(f"retina-fast needs {error.name}: pip install 'retina_fast[all]'") from error

app = typer.Typer(help="RetinaNet, fast: train, evaluate and detect.", no_args_is_help=True, add_completion=False)
console = Console()
silent = Console(quiet=True)  # of all processes of a command but the first

WORKERS = max(1, (os.cpu_count() or 1) // 2)
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare images.")]
ModelFile = Annotated[
    Path | None, typer.Option(help="The model file that train wrote; without it, the trees that come with the package.")
]


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Errors that a person can put right, and warnings, as one sentence on stderr."""
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        stderr.print(f"warning: {message}", style="yellow", markup=False)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except UserError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = f"this command needs {error.name}: pip install 'retina_fast[all]'"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"the disk is full{f' ({error.filename})' if error.filename else ''}: make room, and go on"
    except torch.OutOfMemoryError:
        problem = "the GPU's memory is too small for this: give a smaller --batch-size or --crop, or --accumulate"
    else:
        return
    stderr.print(f"error: {problem}", style="red", markup=False)
    raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(metadata.version("retina_fast"))
        except metadata.PackageNotFoundError:
            print("an uninstalled checkout")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def train(
    json: Annotated[Path, typer.Option(help="Annotations to train on, COCO JSON.")],
    images: Annotated[Path, typer.Option(help="The folder of their images.")],
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    model: Annotated[str, typer.Option(help="The network.")] = "retinanet_resnet18_fpn_lite",
    recipe: Annotated[
        str, typer.Option(help="default; or spinenet-b, spinenet-c, spinenet-c-143, spinenet-c-190, as published.")
    ] = "default",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps, rounded up to equal intervals; the recipe's, 6000, by default."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step, of all processes; the recipe's, 4, by default.")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts in which a process computes its images of a step, to fit into memory.")
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Peak learning rate. By default the recipe's, 0.002 for 4 images a step, which grows with their "
            "number: as its square root, or, with SGD, in proportion.",
        ),
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute convolutions in bfloat16; by default where the hardware does.")
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Side of the training crops in pixels, 0: whole images, or by a published recipe crops of the model's "
            "size. By default 256 for lite models and with --image-scale.",
        ),
    ] = None,
    flips: Annotated[
        Flips, typer.Option(help="Mirror images as likely as the picture itself; all: turns by 90 degrees too.")
    ] = Flips.HORIZONTAL,
    every: Annotated[
        int, typer.Option(min=1, help="Steps from one checkpoint, and validation, to the next; at most.")
    ] = 500,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest checkpoints stay.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data order and augmentation.")] = 0,
    workers: Workers = WORKERS,
    image_scale: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="By which the finished model scales images, where it would resize them to a size of its own; crops "
            "have their own scales.",
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A model file to start from.")] = None,
    val_json: Annotated[Path | None, typer.Option(help="Annotations to validate on.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="The folder of their images.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Train a detector on a COCO data set."""
    with _one_sentence(), joined() as processes:
        from retina_fast.commands.run_files import Stopped
        from retina_fast.commands.settings import TrainSettings, has_bf16
        from retina_fast.commands.train import train as run
        from retina_fast.recipes import recipe_named

        chosen = recipe_named(recipe)
        if (val_json is None) != (val_images is None):
            raise UserError("--val-json and --val-images belong together: give both or neither")
        validation = CocoDataset(val_json, val_images) if val_json and val_images else None
        if crop is None:
            by_scale = model.endswith("_lite") or image_scale is not None
            crop = 256 if by_scale else 0  # the others resize every image to 800 px or so
        data = CocoDataset(json, images)
        batch_size = batch_size or chosen.batch_size
        steps = steps or chosen.steps_for(len(data), batch_size)
        lr = chosen.lr_at(batch_size) if lr is None else lr
        bf16 = has_bf16() if bf16 is None else bf16
        settings = TrainSettings(
            model, steps, batch_size, lr, crop, flips, seed, image_scale, recipe, every, accumulate, bf16
        )
        shown = console if processes.first else silent
        try:
            file = run(settings, data, validation, checkpoint, output, resume, workers, shown, processes, keep)
        except Stopped:
            shown.print(f"Stopped and saved. To go on, give the same command with --resume (run: {output})")
            raise typer.Exit(130) from None
        shown.print(f"Wrote {file}")


@app.command()
def evaluate(
    json: Annotated[Path, typer.Option(help="Annotations, COCO JSON.")],
    images: Annotated[Path, typer.Option(help="The folder of their images.")],
    checkpoint: ModelFile = None,
    workers: Workers = WORKERS,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw of precision over recall.")] = None,
) -> None:
    """Print a model's COCO metrics on a data set."""
    with _one_sentence(), joined() as processes:
        from retina_fast.commands.evaluate import evaluate as run
        from retina_fast.commands.evaluate import report
        from retina_fast.commands.predict import TREES, load_model

        model, content = load_model(checkpoint or TREES)
        shown = console if processes.first else silent
        found = run(model, content.classes, CocoDataset(json, images), workers, shown, processes)
        if found:
            report(found, console)
        if found and plot:
            from retina_fast.commands.precision_recall import plot_precision_recall

            plot_precision_recall(found.metrics, plot)
            console.print(f"Wrote {plot}")


@app.command()
def detect(
    inputs: Annotated[
        list[Path], typer.Argument(help="Image files, folders of them, or .txt lists of them.", metavar="IMAGE...")
    ],
    output: Annotated[Path, typer.Option(help="The folder for detections.json and pictures.")] = Path("out"),
    score: Annotated[float, typer.Option(min=0, max=1, help="The least score of a detection.")] = 0.3,
    checkpoint: ModelFile = None,
    workers: Workers = WORKERS,
) -> None:
    """Find objects in images."""
    with _one_sentence(), joined() as processes:
        from retina_fast.commands.detect import detect as run
        from retina_fast.commands.detect import report
        from retina_fast.commands.predict import TREES, load_model

        model, content = load_model(checkpoint or TREES)
        shown = console if processes.first else silent
        found = run(model, content, inputs, output, score, workers, shown, processes)
        if found:
            report(found, console)
            if not found.images:
                raise UserError("not one of the images can be read")
            console.print(f"Wrote {output / 'detections.json'} and {found.images} pictures beside it")


if __name__ == "__main__":
    app()

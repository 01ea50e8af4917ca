"""The command line: `retina-fast train`, `evaluate`, `detect`, `check`, `export` and `bench`."""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch

from retina_fast.data.augment import Flips
from retina_fast.data.errors import UserError
from retina_fast.data.processes import Processes, joined
from retina_fast.data.voc import open_data

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(f"retina-fast needs {error.name}: pip install 'retina_fast[all]'") from error

app = typer.Typer(
    help="RetinaNet, fast: train, evaluate, detect, check, export and measure.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()
silent = Console(quiet=True)  # of all processes of a command but the first

DEFAULT_MODEL = "retinanet_resnet18_fpn_lite"
WORKERS = max(1, (os.cpu_count() or 1) // 2)
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare images.")]
Images = Annotated[Path | None, typer.Option(help="The folder of their images; needed with COCO JSON.")]
Annotations = Annotated[
    Path,
    typer.Option(
        "--json", "--voc", help="Annotations: COCO JSON; or a Pascal VOC folder, or one of its lists of images."
    ),
]
ModelFile = Annotated[
    Path | None, typer.Option(help="The model file that train wrote; without it, the trees that come with the package.")
]

Published = Annotated[
    str | None, typer.Option("--model", help="A network with published --weights, in place of a checkpoint.")
]
Weights = Annotated[
    str | None, typer.Option(help="COCO_V1: torchvision's weights of --model, which it downloads. Labels are COCO's.")
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


@contextlib.contextmanager
def _said_once(processes: Processes) -> Iterator[None]:
    """Warnings of what all processes see are the first one's."""
    with warnings.catch_warnings():
        if not processes.first:
            warnings.simplefilter("ignore")
        yield


def _model(checkpoint: Path | None, model: str | None, weights: str | None) -> tuple[Any, Any]:
    """The network that a person chose, and its classes."""
    from retina_fast.predict.load import TREES, load_model, load_published

    if model and weights and not checkpoint:
        return load_published(model, weights)
    if model or weights:
        raise UserError("--model and --weights belong together, in place of --checkpoint")
    return load_model(checkpoint or TREES)


def _exported(file: Path, checkpoint: Path | None) -> Any:
    """The exported file that a person chose."""
    from retina_fast.deploy.exported import load_exported

    if checkpoint:
        raise UserError("--model and --checkpoint exclude each other: give one of them")
    exported = load_exported(file)
    if exported.metadata["input"] != "uint8":
        raise UserError(f"{file}: takes prepared images: export it without --no-preprocess")
    return exported


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
    json: Annotations,
    images: Images = None,
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    model: Annotated[str, typer.Option(help="The network.")] = DEFAULT_MODEL,
    recipe: Annotated[
        str,
        typer.Option(
            help="default; or, as published: torchvision-v1, torchvision-v2, spinenet-b, spinenet-c, spinenet-c-143, "
            "spinenet-c-190."
        ),
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
            help="Side of the training crops in pixels, 0: whole images, or by SpineNet's recipes crops of the model's "
            "size. By default 256, by the default recipe, for lite models and with --image-scale.",
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
            help="By which the model scales images, where it would resize them to a size of its own; crops have their "
            "own scales.",
        ),
    ] = None,
    weights_backbone: Annotated[
        str | None,
        typer.Option(
            help="ImageNet weights to start the ResNet from, by torchvision's name, IMAGENET1K_V1 or _V2; torchvision "
            "downloads them. By default the recipe's; `none` for random ones, or, with --checkpoint, to freeze nothing."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A model file to start from, in place of the backbone's weights.")
    ] = None,
    val_json: Annotated[
        Path | None, typer.Option("--val-json", "--val-voc", help="Annotations to validate on.")
    ] = None,
    val_images: Images = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Train a detector on a COCO or Pascal VOC data set."""
    with _one_sentence(), joined() as processes:
        from retina_fast.data.check import warn_of_faults
        from retina_fast.train.recipes import recipe_named
        from retina_fast.train.run import train as run
        from retina_fast.train.run_files import Stopped
        from retina_fast.train.settings import TrainSettings, has_bf16

        chosen = recipe_named(recipe)
        if val_images and not val_json:
            raise UserError("--val-images belongs to --val-json: give both or neither")
        if weights_backbone not in (None, "none") and checkpoint:
            raise UserError("--weights-backbone and --checkpoint exclude each other: give one of them")
        with _said_once(processes):
            data = open_data(json, images)
            warn_of_faults(data)
            validation = open_data(val_json, val_images, data.classes) if val_json else None
        shown = console if processes.first else silent
        if chosen.only_objects:
            whole, data = len(data), data.with_objects()
            shown.print(f"{whole - len(data)} of {whole} images have no object: the recipe leaves them out")
        if crop is None:
            by_scale = model.endswith("_lite") or image_scale is not None
            crop = chosen.crop if by_scale else 0  # the others resize every image to 800 px or so
        batch_size = batch_size or chosen.batch_size
        steps = steps or chosen.steps_for(len(data), batch_size)
        lr = chosen.lr_at(batch_size) if lr is None else lr
        bf16 = has_bf16() if bf16 is None else bf16
        backbone = None if weights_backbone == "none" else weights_backbone or chosen.weights_backbone
        settings = TrainSettings(
            model, steps, batch_size, lr, crop, flips, seed, image_scale, recipe, every, accumulate, bf16, backbone
        )
        try:
            file = run(settings, data, validation, checkpoint, output, resume, workers, shown, processes, keep)
        except Stopped:
            shown.print(f"Stopped and saved. To go on, give the same command with --resume (run: {output})")
            raise typer.Exit(130) from None
        shown.print(f"Wrote {file}")


@app.command()
def evaluate(
    json: Annotations,
    images: Images = None,
    checkpoint: ModelFile = None,
    model: Published = None,
    weights: Weights = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, help="Of an image that count, best first; by default all. COCO's tables: 100.")
    ] = None,
    workers: Workers = WORKERS,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw of precision over recall.")] = None,
) -> None:
    """Print a model's COCO metrics on a data set."""
    with _one_sentence(), joined() as processes:
        from retina_fast.predict.evaluate import evaluate as run
        from retina_fast.predict.evaluate import report

        network, content = _model(checkpoint, model, weights)
        with _said_once(processes):
            data = open_data(json, images)
        shown = console if processes.first else silent
        found = run(network, content.classes, data, workers, shown, max_detections, processes)
        if found:
            report(found, console)
        if found and plot:
            from retina_fast.data.precision_recall import plot_precision_recall

            plot_precision_recall(found.metrics, plot)
            console.print(f"Wrote {plot}", soft_wrap=True)


@app.command()
def detect(
    inputs: Annotated[
        list[Path], typer.Argument(help="Image files, folders of them, or .txt lists.", metavar="IMAGE...")
    ],
    output: Annotated[Path, typer.Option(help="The folder for detections.json and pictures.")] = Path("out"),
    score: Annotated[float, typer.Option(min=0, max=1, help="The least score of a detection.")] = 0.3,
    checkpoint: ModelFile = None,
    model: Annotated[
        str | None,
        typer.Option(help="A file that export wrote; or, with --weights, a network. In place of a checkpoint."),
    ] = None,
    weights: Weights = None,
    workers: Workers = WORKERS,
) -> None:
    """Find objects in images."""
    with _one_sentence(), joined() as processes:
        from retina_fast.predict.detect import detect as run
        from retina_fast.predict.detect import report

        network: Any
        content: Any
        if model and not weights:
            network = content = _exported(Path(model), checkpoint)
        else:
            network, content = _model(checkpoint, model, weights)
        shown = console if processes.first else silent
        found = run(network, content, inputs, output, score, workers, shown, processes)
        if found:
            report(found, console)
            if not found.images:
                raise UserError("not one of the images can be read")
            console.print(f"Wrote {output / 'detections.json'} and {found.images} pictures beside it", soft_wrap=True)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="COCO JSON; or a Pascal VOC folder, or one of its lists of images.")],
    images: Images = None,
    model: Annotated[str, typer.Option(help="The network to be trained, for its anchors.")] = DEFAULT_MODEL,
    workers: Workers = WORKERS,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw of the sizes of boxes and anchors.")] = None,
) -> None:
    """Name everything that is wrong with a data set before training on it; the exit code is 1 if something is."""
    with _one_sentence():
        from retina_fast.checkpoint import build
        from retina_fast.data import check as command

        def show(fault: object) -> None:
            console.print(str(fault), markup=False, soft_wrap=True, highlight=False)

        checked = command.check(data, images, build(model, 1), workers, console, show)
        command.show(checked, console)
        if plot:
            command.plot(checked, plot)
            console.print(f"Wrote {plot}", soft_wrap=True)
        if checked.faults:
            raise typer.Exit(1)


@app.command()
def export(
    size: Annotated[str, typer.Option(help="Height and width of the images it is for, in pixels: 512x640.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="The model file that train wrote; without it, the trees that come with the package."),
    ] = None,
    format: Annotated[str, typer.Option(help="torch-export, onnx or aotinductor.")] = "onnx",
    output: Annotated[Path | None, typer.Option(help="The file; by default the checkpoint's name, here.")] = None,
    preprocess: Annotated[
        bool, typer.Option(help="Take uint8 images, and scale, normalise and resize them inside.")
    ] = True,
) -> None:
    """Write a detector to one file that runs without this package."""
    with _one_sentence():
        from retina_fast.deploy.export import FORMATS
        from retina_fast.deploy.export import export as run
        from retina_fast.predict.load import TREES, load_model

        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise UserError(f"--size must be a height and a width such as 512x640, got {size!r}")
        path = checkpoint or TREES
        model, content = load_model(path)
        file = output or Path(path.stem + FORMATS.get(format, ""))
        height, width = map(int, sides)
        run(model, file, format, (height, width), preprocess, content.classes, content.category_ids)
        console.print(f"Wrote {file}", soft_wrap=True)


@app.command()
def bench(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, or folders of them; by default noise.", metavar="[IMAGE]..."),
    ] = None,
    batch_sizes: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.  [default: 1 2 4]")] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the noise images in pixels.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median is taken.")] = 5,
    checkpoint: ModelFile = None,
    model: Annotated[
        str | None, typer.Option(help="A network with random weights and 91 classes, in place of a checkpoint.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    output: Annotated[Path, typer.Option(help="The folder for bench.png and bench.json.")] = Path("out/bench"),
) -> None:
    """Measure images a second: torchvision, this package's model, and its engine, with the same weights."""
    with _one_sentence():
        from retina_fast.checkpoint import build
        from retina_fast.data.coco import read_image
        from retina_fast.deploy.bench import bench as run
        from retina_fast.predict.detect import image_files
        from retina_fast.predict.load import TREES, load_model

        if model is not None and checkpoint is not None:
            raise UserError("--model and --checkpoint exclude each other: give one of them")
        network = build(model, 91).eval() if model else load_model(checkpoint or TREES)[0]
        try:
            network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
        place = next(network.parameters()).device
        noise = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8)]
        images = [read_image(path) for path in image_files(inputs)] if inputs else noise
        images = [image.as_subclass(torch.Tensor).to(place) for image in images]
        name = model or str(checkpoint or "the embedded tree detector")
        run(network, images, batch_sizes or [1, 2, 4], rounds, output, name, console)
        console.print(f"Wrote bench.png and bench.json in {output}", soft_wrap=True)


if __name__ == "__main__":
    app()

"""`retina-fast bench`: how fast torchvision's model, this package's and its engine are on this machine."""

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from retina_fast.commands.shared import MOST_IMAGES, ModelFile, console, one_sentence
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file


def bench(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, or folders of them; by default noise.", metavar="[IMAGE]..."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_IMAGES, help="May be repeated.  [default: 1 2 4]")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=32, help="Side of the noise images in pixels.  [default: 512]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median is taken.")] = 5,
    checkpoint: ModelFile = None,
    model: Annotated[str | None, typer.Option(help="A network with random weights, in place of a checkpoint.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="How many --model has.  [default: 91]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    others: Annotated[
        bool, typer.Option("--others", help="Also ONNX Runtime, OpenVINO and torch.compile, where they are installed.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The folder for bench.png and bench.json.")] = Path("out/bench"),
) -> None:
    """Measure images a second: torchvision, this package's model, and its engine, with the same weights."""
    with one_sentence():
        from retina_fast.checkpoint import build
        from retina_fast.data.images import read_image
        from retina_fast.deploy.bench import bench as run
        from retina_fast.predict.image_files import image_files
        from retina_fast.predict.load import TREES, load_model

        if model is not None and checkpoint is not None:
            raise UserError("--model and --checkpoint exclude each other: give one of them")
        if classes is not None and model is None:
            raise UserError(f"--classes {classes}: a checkpoint has its own; it goes with --model")
        if inputs and size:
            raise UserError("--size is of the noise that is measured without images: leave it out, or the images")
        network = build(model, classes or 91).eval() if model else load_model(checkpoint or TREES)[0]
        try:
            network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
        place = next(network.parameters()).device
        if place.type == "meta":
            raise UserError(f"--device {device}: holds no numbers, so that nothing can be measured on it")
        side = size or 512
        noise = [torch.randint(0, 256, (3, side, side), dtype=torch.uint8)]
        files = list(image_files(inputs or [], warnings.warn))
        for name in ("bench.png", "bench.json"):
            if (output / name).exists():
                check_file(output / name, files)
        images = [read_image(path) for path in files] if inputs else noise
        images = [image.as_subclass(torch.Tensor).to(place) for image in images]
        name = f"{model}, {classes or 91} classes" if model else str(checkpoint or "the embedded tree detector")
        run(network, images, batch_sizes or [1, 2, 4], rounds, output, name, console, others)
        console.print(f"Wrote bench.png and bench.json in {output}", soft_wrap=True)

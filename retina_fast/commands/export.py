"""`retina-fast export`: a detector as one file that runs without this package."""

from pathlib import Path
from typing import Annotated

import typer

from retina_fast.commands.shared import console, one_sentence
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_file


def export(
    size: Annotated[str, typer.Option(help="Height and width of the images it is for, in pixels: 512x640.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="The model file that train wrote; without it, the trees that come with the package."),
    ] = None,
    format: Annotated[str, typer.Option(help="torch-export, onnx, openvino or aotinductor.")] = "onnx",
    output: Annotated[Path | None, typer.Option(help="The file; by default the checkpoint's name, here.")] = None,
    preprocess: Annotated[
        bool, typer.Option(help="Take uint8 images, and scale, normalise and resize them inside.")
    ] = True,
    quantize: Annotated[
        Path | None,
        typer.Option(help="Convs in eight bits, calibrated on the images of this folder, of --size; onnx alone."),
    ] = None,
    float32_share: Annotated[
        float, typer.Option(min=0, max=1, help="With --quantize: how much of the work may stay in float32.")
    ] = 0.0,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="With --quantize: zero points of 0 alone, as TensorRT takes them.")
    ] = False,
) -> None:
    """Write a detector to one file that runs without this package."""
    with one_sentence():
        from retina_fast.deploy.export.exported import may_be_replaced
        from retina_fast.deploy.export.formats import FORMATS
        from retina_fast.deploy.export.openvino_files import weights_file
        from retina_fast.deploy.export.write import export as run
        from retina_fast.predict.load import TREES, load_model

        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise UserError(f"--size must be a height and a width such as 512x640, got {size!r}")
        for option, given in (("--float32-share", float32_share), ("--symmetric", symmetric)):
            if given and not quantize:
                raise UserError(f"{option} is of a model in eight bits: give --quantize, too, or leave it out")
        path = checkpoint or TREES
        file = output or Path(path.stem + (FORMATS[format].suffix if format in FORMATS else ""))
        if not output and file.exists():
            raise UserError(f"{file}: is there already; to replace it, give its name as --output")
        for written in (file, weights_file(file)) if format == "openvino" else (file,):
            check_file(written, [path])
        if file.is_file() and file.stat().st_size and not may_be_replaced(file):
            raise UserError(f"{file}: is there already, and is no exported model; give another name")
        model, content = load_model(path)
        height, width = map(int, sides)
        names = content.classes, content.category_ids
        described = run(
            model, file, format, (height, width), preprocess, *names, quantize, float32_share, symmetric
        )  # fmt: skip
        if quantize:
            console.print(described["quantized"]["summary"], soft_wrap=True, highlight=False)
        console.print(f"Wrote {file}", soft_wrap=True)

"""`retina-fast train`: a detector trained on a COCO or Pascal VOC data set."""

from pathlib import Path
from typing import Annotated

import typer

from retina_fast.commands.shared import (
    DEFAULT_MODEL,
    MOST_IMAGES,
    Annotations,
    Images,
    Workers,
    console_of,
    finite,
    one_sentence,
    said_once,
)
from retina_fast.data.augment import Flips
from retina_fast.data.errors import UserError
from retina_fast.data.processes import WORKERS, joined
from retina_fast.data.voc import open_data


def train(
    json: Annotations,
    images: Images = None,
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    model: Annotated[str, typer.Option(help="The network: a name, or a JSON file that search wrote.")] = DEFAULT_MODEL,
    recipe: Annotated[
        str,
        typer.Option(
            help="default; or, as published: torchvision-v1, torchvision-v2, atss-1x, gfl-1x, gfl-2x, vfnet-1x, "
            "vfnet-2x, tood-1x, tood-2x, spinenet-b, spinenet-c, spinenet-c-143, spinenet-c-190, spinenet-mobile."
        ),
    ] = "default",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps, rounded up to equal intervals; the recipe's, 6000, by default."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_IMAGES, help="Images a step, of all processes; the recipe's, 4, by default."),
    ] = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts in which a process computes its images of a step, to fit into memory.")
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights, data order and augmentation.")] = 0,
    workers: Workers = WORKERS,
    image_scale: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=100,
            callback=finite,
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
    matcher: Annotated[
        str | None,
        typer.Option(
            help="atss: anchors are matched to objects by adaptive training sample selection, not thresholds; "
            "task_aligned: by how well they predict them."
        ),
    ] = None,
    classification_loss: Annotated[
        str | None, typer.Option(help="quality_focal or varifocal: scores that learn how well boxes fit.")
    ] = None,
    anchors: Annotated[
        str | None, typer.Option(help="auto: one anchor a cell, of sizes and a ratio that fit the boxes of the data.")
    ] = None,
    box_loss: Annotated[
        str | None, typer.Option(help="l1, smooth_l1, giou, diou or ciou; by default the model's own.")
    ] = None,
    box_weights: Annotated[
        str | None, typer.Option(help="quality: box losses are weighed by the IoU of the predicted box.")
    ] = None,
    reg_max: Annotated[
        int | None,
        typer.Option(min=1, help="Sides of boxes are distributions over so many eighths of the anchor; 16 is usual."),
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
    with one_sentence(), joined() as processes:
        from retina_fast.data.check import warn_of_faults
        from retina_fast.train import Stopped, TrainSettings
        from retina_fast.train import train as run
        from retina_fast.train.model_file import read_model_file

        name, arguments = read_model_file(Path(model)) if model.endswith(".json") else (model, {})
        for_builder = {
            "matcher": matcher,
            "classification_loss": classification_loss,
            "box_loss": box_loss,
            "box_weights": box_weights,
            "reg_max": reg_max,
        }
        arguments |= {option: value for option, value in for_builder.items() if value is not None}
        chosen = TrainSettings(
            name,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            crop=crop,
            flips=flips,
            seed=seed,
            image_scale=image_scale,
            recipe=recipe,
            every=every,
            accumulate=accumulate,
            bf16=bf16,
            weights_backbone=weights_backbone,
            arguments=arguments,
            anchors=anchors,
        )
        if val_images and not val_json:
            raise UserError("--val-images belongs to --val-json: give both or neither")
        with said_once(processes):
            data = open_data(json, images)
            warn_of_faults(data)
            validation = open_data(val_json, val_images, data.classes) if val_json else None
            if validation:
                warn_of_faults(validation)
        console = console_of(processes)
        try:
            file = run(
                chosen.resolve(data, checkpoint),
                data,
                validation=validation,
                start_from=checkpoint,
                output=output,
                resume=resume,
                keep=keep,
                workers=workers,
                console=console,
                processes=processes,
            )
        except Stopped:
            console.print(
                f"Stopped and saved. To go on, give the same command with --resume (run: {output})", soft_wrap=True
            )
            raise typer.Exit(130) from None
        console.print(f"Wrote {file}", soft_wrap=True)

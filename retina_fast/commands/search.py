"""`retina-fast search`: scale permutations of SpineNet that promise more than others for their multiply-adds."""

import math
from pathlib import Path
from typing import Annotated

import typer

from retina_fast.backbones.specification import LEARNED
from retina_fast.commands.shared import MOST_IMAGES, Images, console, finite, one_sentence
from retina_fast.data.augment import Flips
from retina_fast.data.errors import UserError
from retina_fast.data.voc import open_data


def search(
    output: Annotated[
        Path, typer.Option(help="The search's folder; the same command goes on with it, or joins it.")
    ] = (Path("runs/search")),
    json: Annotated[
        Path | None,
        typer.Option("--json", "--voc", help="Annotations to train on: each point is scored by a short run."),
    ] = None,
    images: Images = None,
    val_json: Annotated[
        Path | None,
        typer.Option("--val-json", "--val-voc", help="Annotations to score the runs on by another --metric."),
    ] = None,
    val_images: Images = None,
    trials: Annotated[int, typer.Option(min=1, help="How many points are tried, by all workers together.")] = 1000,
    space: Annotated[str, typer.Option(help="paper, public or mobile.")] = "paper",
    model: Annotated[
        str | None,
        typer.Option(help="The detector that is searched for, whose size counts.  [default: SpineNet-49]"),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="nsga2, tpe or random; by default nsga2, with training tpe.")
    ] = None,
    max_gmacs: Annotated[float | None, typer.Option(min=0, callback=finite, help="Most multiply-adds, in G.")] = None,
    min_gmacs: Annotated[float, typer.Option(min=0, callback=finite, help="Fewest multiply-adds, in G.")] = 0.0,
    max_mparams: Annotated[float | None, typer.Option(min=0, callback=finite, help="Most parameters, in M.")] = None,
    fusion: Annotated[
        list[str] | None,
        typer.Option(help="none, learned or two factors as 0.5:1, between which blocks choose; may be repeated."),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(min=0.01, max=4, help="Between which links choose; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampler and the training runs.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="The URL of a database for several machines: postgresql://..., mysql://...")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="The folder of another search, whose best points are tried first.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of a training run.")] = 300,
    parts: Annotated[int, typer.Option(min=1, help="Of a run; after each it may be ended.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images a step.")] = 4,
    crop: Annotated[int, typer.Option(min=32, help="Side of the training crops in pixels.")] = 256,
    image_scale: Annotated[
        float, typer.Option(min=0.1, max=100, callback=finite, help="By which the network scales images.")
    ] = 1.0,
    flips: Annotated[Flips, typer.Option(help="As in train.")] = Flips.HORIZONTAL,
    metric: Annotated[
        str, typer.Option(help="loss, in training; or a metric of the validation, such as AP50.")
    ] = "loss",
) -> None:
    """Search for scale permutations: without data by an entropy score, with data by short training runs."""
    with one_sentence():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from retina_fast.search.study import Search, SearchSettings
        from retina_fast.search.trained import MOBILE_PROXY_SIZE, PROXY_SIZE, Proxy
        from retina_fast.train import Stopped

        for option, most, least in (("gmacs", max_gmacs, min_gmacs), ("mparams", max_mparams, 0.0)):
            if most is not None and most <= least:
                raise UserError(f"--max-{option} must be above {least:g}, got {most:g}")
        mobile = space == "mobile"
        chosen = model or ("retinanet_spinenet49_mobile" if mobile else "retinanet_spinenet49")
        settings = SearchSettings(
            space,
            chosen,
            sampler or ("tpe" if json else "nsga2"),
            max_macs=math.inf if max_gmacs is None else max_gmacs * 1e9,
            min_macs=min_gmacs * 1e9,
            max_parameters=math.inf if max_mparams is None else max_mparams * 1e6,
            seed=seed,
            fusions=tuple(map(_fusion, fusion or ["none"])),
            alphas=tuple(alpha or [None]),
        )
        if val_json and not json:
            raise UserError("--val-json belongs to --json: give both, or neither")
        if metric != "loss" and not val_json:
            raise UserError(f"--metric {metric} is of a validation: give --json and --val-json, or leave it out")
        proxy = None
        if json:
            data = open_data(json, images)
            proxy = Proxy(
                data,
                open_data(val_json, val_images, data.classes) if val_json else None,
                size=MOBILE_PROXY_SIZE if mobile else PROXY_SIZE,
                model=chosen,
                steps=steps,
                parts=parts,
                batch_size=batch_size,
                crop=crop,
                image_scale=image_scale,
                flips=flips,
                metric=metric,
            )
        found = Search(settings, output, proxy, storage, start_from)
        columns = TextColumn("Trials"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=trials)
            try:
                found.run(trials, lambda done: progress.update(task, completed=done))
            except Stopped:
                progress.stop()
                console.print(f"Stopped. The same command goes on (search: {output})", soft_wrap=True)
                raise typer.Exit(130) from None
        best = found.best(1)
        if not best:
            raise UserError(f"of {trials} trials none ended with a score within the limits")
        console.print(
            f"Best: score {best[0].score:.6g}, {best[0].macs / 1e9:.1f} G multiply-adds, "
            f"{best[0].parameters / 1e6:.2f} M parameters"
        )
        console.print(f"Wrote {output / 'best-1.json'}, which train takes as --model", soft_wrap=True)


def _fusion(text: str) -> str | tuple[float, ...] | None:
    if text in ("none", LEARNED):
        return None if text == "none" else text
    try:
        a, b = map(float, text.split(":"))
    except ValueError:
        a = b = math.nan
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise UserError(f"--fusion must be none, learned or two positive factors such as 0.5:1, got {text}")
    return a, b

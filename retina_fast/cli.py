"""The command line: `retina-fast train`, `evaluate`, `detect`, `check`, `export`, `bench` and `search`."""

import io
import sys
from importlib import metadata
from typing import Annotated

try:
    import typer

    from retina_fast.commands.bench import bench
    from retina_fast.commands.check import check
    from retina_fast.commands.detect import detect
    from retina_fast.commands.evaluate import evaluate
    from retina_fast.commands.export import export
    from retina_fast.commands.search import search
    from retina_fast.commands.train import train
except ModuleNotFoundError as error:
    raise SystemExit(
        f"retina-fast needs {error.name}: pip install '.[all]' in the folder of retina_fast's source"
    ) from error

app = typer.Typer(
    help="RetinaNet, fast: train, evaluate, detect, check, export, measure and search.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (train, evaluate, detect, check, export, bench, search):
    app.command()(command)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what the terminal, or no terminal, can show
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    app()

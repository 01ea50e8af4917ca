"""The package as it is installed: what the wheel holds, and what importing it brings along."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "av",
    "faster_coco_eval",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxscript",
    "openvino",
    "optuna",
    "pandas",
    "rasterio",
    "rich",
    "safetensors",
    "supervision",
    "timm",
    "typer",
)
USE = f"""
import sys
import retina_fast
print(retina_fast.__file__)
print(sorted(set({EXTRAS}) & set(sys.modules)))
import kernels
import retina_fast.kernels.levels
print(kernels.owner)
import torch
model = retina_fast.retinanet_resnet18_fpn_lite(weights_backbone=None, num_classes=2).eval()
print(len(model([torch.rand(3, 32, 32)])))
"""


def run(*command, folder, **variables):
    """What a command prints, run in a folder that is not the checkout."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of the checkout, with a file of weights in it."""
    version = metadata.version("setuptools") if list(metadata.distributions(name="setuptools")) else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip("needs setuptools>=77")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("retina_fast", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.pt")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    (folder / "retina_fast" / "weights").mkdir(exist_ok=True)
    (folder / "retina_fast" / "weights" / "small.pt").touch()
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    run("-c", build, folder=folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def sources():
    """Every file of code by the place it is imported from."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in (("retina_fast", "retina_fast"), ("kernels", "retina_fast/kernels"))
        for path in (ROOT / folder).rglob("*.py")
    }


def test_the_oldest_versions_are_those_that_the_package_needs():
    pinned = dict(re.findall(r"^(\w+)==(\S+)\.0$", (ROOT / "oldest.txt").read_text(), re.MULTILINE))
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(need.split(">=") for need in needed if ">=" in need)
    assert bounds
    assert bounds == {name: pinned.get(name) for name in bounds}


def test_every_subpackage_is_listed():
    """setuptools takes the listed packages alone: one forgotten is missed only after installing."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.rpartition("/")[0].replace("/", ".") for name in sources()} == set(listed)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide Hugging Face's package of that name


MOVED = """
import inspect, sys
import retina_fast
inspect.getmodule(lambda: 0)  # asks every module for its file
print("faster_coco_eval" in sys.modules)
from retina_fast.errors import UserError
from retina_fast.metrics import coco_metrics
import retina_fast.exported, retina_fast.engine as engine
print(UserError.__module__, coco_metrics.__module__, engine.Engine.__module__, retina_fast.exported.Exported.__module__)
try:
    from retina_fast.metrics import nothing
except ImportError as error:
    print("nothing" in str(error))
"""


@pytest.mark.slow
def test_modules_that_moved_are_found_under_their_earlier_names(tmp_path):
    """And nothing is imported for them before it is asked for."""
    places = "data.errors", "data.metrics", "deploy.engine", "deploy.export.exported"
    expected = ["False", " ".join(f"retina_fast.{place}" for place in places), "True"]
    assert run("-W", "ignore", "-c", MOVED, folder=tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") == expected


def needed_by(extra: str) -> set[str]:
    """The names of the distributions that the package asks for with an extra, or without one: ''."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    for line in project["optional-dependencies"][extra] if extra else []:
        own = re.fullmatch(r"retina_fast\[(.+)\]", line)
        found |= set().union(*map(needed_by, own[1].split(","))) if own else {re.split(r"[^\w-]", line)[0]}
    return {name.lower().replace("_", "-") for name in found}


def imported_by(module: str) -> set[str]:
    """The distributions that a module imports anywhere in it, or in what it imports of this package."""
    waiting, seen, found = {module}, set(), set()
    while waiting:
        seen.add(name := waiting.pop())
        names = {alias.name for node in _walk(name) if isinstance(node, ast.Import) for alias in node.names}
        for node in _walk(name):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        waiting |= {name for name in names if name.startswith("retina_fast") and _file(name)} - seen
        found |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"retina_fast"}
    return {{"PIL": "pillow"}.get(name, name).replace("_", "-") for name in found}


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _walk(module: str) -> list[ast.AST]:
    file = _file(module)
    assert file
    tree = ast.walk(ast.parse(file.read_text()))
    return [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]


# What a command needs only for a backbone, an exported file, or several processes, where the user asks for them.
ASKED_FOR = {"timm", "onnx", "onnxruntime", "onnxscript", "openvino", "lightning", "av", "rasterio"}
CONVERTED_TO = {"pandas", "supervision"}  # by those who have them
COMMANDS = {
    "train": "train",
    "evaluate": "eval",
    "detect": "eval",
    "bench": "plot",
    "check": "eval",
    "export": "export",
    "search": "search",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_import_of_a_command_is_in_an_extra(command):
    module = f"retina_fast.commands.{command}"
    missing = imported_by(module) - needed_by(COMMANDS[command]) - needed_by("cli") - needed_by("plot")
    assert missing <= ASKED_FOR | CONVERTED_TO
    assert imported_by(module) <= needed_by("all") | needed_by("openvino") | CONVERTED_TO
    assert "typer" in imported_by(module)


def test_the_extra_for_training_is_enough_for_it():
    needed = imported_by("retina_fast.commands.train") | imported_by("retina_fast.train.run")
    assert needed - needed_by("train") <= (ASKED_FOR | CONVERTED_TO) - {"lightning"}
    assert {"rich", "matplotlib", "faster-coco-eval", "lightning"} <= needed


def test_wheel_and_sdist(built):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sources() | {"retina_fast/py.typed", "retina_fast/weights/small.pt"} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"retina_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= packed
    assert {"LICENSE", "pyproject.toml", "retina_fast/py.typed", "retina_fast/weights/small.pt"} <= packed


@pytest.mark.parametrize("place", [pytest.param("checkout", marks=pytest.mark.slow), "wheel"])
def test_import_beside_hugging_faces_kernels(place, request, tmp_path):
    """A package called kernels stays importable, also from the checkout; no extra is imported with the core."""
    home = ROOT
    if place == "wheel":
        home = tmp_path / "installed"
        zipfile.ZipFile(request.getfixturevalue("built")[0]).extractall(home)
    (tmp_path / "theirs" / "kernels").mkdir(parents=True)
    (tmp_path / "theirs" / "kernels" / "__init__.py").write_text("owner = 'Hugging Face'")
    path = os.pathsep.join((str(home), str(tmp_path / "theirs")))
    printed = run("-W", "ignore", "-c", USE, folder=tmp_path, PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert printed == [str(home / "retina_fast" / "__init__.py"), "[]", "Hugging Face", "1"]

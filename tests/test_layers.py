"""The architecture holds: which module may import which, private names stay private, files stay short."""

import ast
import functools
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet

ROOT = Path(__file__).parents[1]

# From low to high. A module imports only modules of lower rows, and of its own where there is no circle.
LAYERS = (
    "kernels",
    "ops device data.errors data.files predict.method",
    "stock",
    "targets transform anchors heads backbones",
    "forward",
    "losses detections",
    "model",
    "convert builders cuda_graph training_step",
    "data",
    "checkpoint",
    "deploy",
    "predict",
    "train",
    "search",
    "commands cli",
)
EVERYTHING = ("retina_fast", "kernels", "benchmarks", "demo", "examples")


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "retina_fast/kernels" not in path.as_posix()]  # a link to kernels/


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("retina_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files(*EVERYTHING)}
TESTS = {module_name(path): path for path in files("tests")}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it; tests may import types of each other in a circle."""
    known, found, nodes = {**MODULES, **TESTS}, set[str](), [*ast.walk(tree_of(path))]
    if path.is_relative_to(ROOT / "tests"):
        blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        of_types = {node for block in blocks for node in ast.walk(block)}
        nodes = [node for node in nodes if node not in of_types]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in known else node.module for module in named.values()}
    return found & known.keys()


def layer(name: str) -> int:
    """The row of the longest entry that the module's name begins with."""
    short = name.removeprefix("retina_fast.")
    entries = [(entry, row) for row, line in enumerate(LAYERS) for entry in line.split()]
    matching = [(len(entry), row) for entry, row in entries if short == entry or short.startswith(f"{entry}.")]
    assert matching, f"{name} has no layer"
    return max(matching)[1]


PRODUCT = sorted(name for name in MODULES if name.startswith("retina_fast."))


@pytest.mark.parametrize("name", PRODUCT)
def test_imports_only_lower_layers(name):
    higher = {other for other in imports(MODULES[name]) & {*PRODUCT} if layer(other) > layer(name)}
    assert not higher


TRACED = [name for name in PRODUCT if layer(name) <= layer("retina_fast.model")]  # by torch.compile, within a model


@pytest.mark.parametrize("name", TRACED)
def test_no_builtin_that_the_oldest_pytorch_cannot_trace(name):
    """TorchDynamo of 2.11 refuses `min` and `max` with a default; that of later versions takes them."""
    for node in ast.walk(tree_of(MODULES[name])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            assert "default" not in [keyword.arg for keyword in node.keywords], f"line {node.lineno}"


def test_no_circle():
    graph = {name: imports(path) - {name} for name, path in {**MODULES, **TESTS}.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, needed in graph.items() if name not in done and needed <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free


def test_the_product_imports_neither_benchmarks_nor_tests():
    outer = ("benchmarks", "tests", "demo", "examples")
    for name in PRODUCT:
        for node in ast.walk(tree_of(MODULES[name])):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in outer, name


def test_product_tests_import_no_benchmark():
    for path in files("tests"):
        if path.parts[-2] == "benchmarks" or path == Path(__file__):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not [name for name in names if name.split(".")[0] == "benchmarks"], path


def private_names(tree: ast.AST) -> set[str]:
    """The names with one underscore that a file defines: functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


def test_no_module_uses_anothers_underscore_names():
    """Names of torch's and torchvision's own classes are not the project's to rename, and do not count."""
    trees = {name: tree_of(path) for name, path in MODULES.items()}
    defined = {name: private_names(tree) for name, tree in trees.items()}
    theirs = {*dir(torch), *dir(torch.Tensor), *dir(nn.Module()), *dir(retinanet), "_loss_type", "_skip_resize"}
    every = set().union(*defined.values()) - theirs
    reaches = []
    for name, tree in trees.items():
        foreign = every - defined[name]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                reaches += [f"{name}: {a.name}" for a in node.names if a.name.startswith("_")]
            elif isinstance(node, ast.Attribute) and node.attr in foreign:
                reaches.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not reaches


def test_the_root_has_few_files_and_files_are_short():
    assert len(list((ROOT / "retina_fast").glob("*.py"))) <= 18
    lengths = {path: len(path.read_text().splitlines()) for path in (*MODULES.values(), *TESTS.values())}
    assert not {path: length for path, length in lengths.items() if length > 350}
    assert statistics.median(lengths[path] for path in MODULES.values()) < 130

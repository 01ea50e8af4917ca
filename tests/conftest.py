"""Kernels run on the GPU if there is one, else interpreted, on CPU tensors. And images that several tests train on."""

import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

if gc.isenabled():  # until all tests are collected, for what is imported stays
    gc.disable()

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torchvision already does
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else each of FakeTensorMode's many questions for GPUs looks for a driver

from torchvision.io import write_png

from retina_fast.kernels.dispatch import INTERPRETED
from tests.instruments import drawn

drawn.quicken()
if INTERPRETED:
    from tests.instruments import interpreter

    interpreter.quicken()

torch.backends.cudnn.allow_tf32 = False  # tolerances are those of float32
torch.manual_seed(0)  # of what test files draw when they are imported

# The first backward pass decides whether autograd has threads, which forked processes could not use. Without a GPU it
# has none, unless fake CUDA tensors come before.
torch.ones(1, requires_grad=True).sum().backward()

_LONGEST = [
    "test_static",
    "test_export",
    "test_model",
    "test_batched_nms",
    "test_train",
    "test_processes",
    "test_predict",
    "test_candidate_selection",
    "test_cli",
    "test_benchmarks",
    "test_torchvision_recipes",
    "test_postprocess",
    "test_packaging",
    "test_onnx_graph",
    "test_engine_shapes",
    "test_orders",
    "test_recipes",
    "test_box_loss",
    "test_fuse",
    "test_anchor_matching",
    "test_focal_loss",
    "test_spinenet",
    "test_detections",
    "test_gpu",
    "test_coco",
    "test_training_step",
    "test_counts",
    "test_docstrings",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that in the end no process is left alone with one of them."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """What modules and tests hold stays: the garbage collector need not look through it again each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What fails once fails again."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which notes a traceback for each kind of device that is not there
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_choices(tmp_path_factory):
    """On a GPU, engines keep what they have timed in a file of this process: other processes would change it between
    two engines that must agree."""
    file = tmp_path_factory.mktemp("choices") / "choices.json"
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            patch.setattr("retina_fast.deploy.engine.user_cache_file", lambda: file)
        yield


COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def write_shapes(folder: Path, count: int, seed: int = 0, size: int = 96) -> tuple[Path, Path]:
    """Images of red and blue rectangles on grey noise; the COCO file and the folder of the images."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    images: list[dict] = []
    annotations: list[dict] = []
    (folder / "images").mkdir(parents=True)
    for image_id in range(count):
        image = (110 + 20 * torch.randn(3, size, size)).clamp(0, 255).to(torch.uint8)
        for cell in rng.sample([(x, y) for x in (0, 1) for y in (0, 1)], 2):
            w, h = rng.randint(18, 34), rng.randint(18, 34)
            x, y = (size // 2 * place + rng.randint(2, size // 2 - 36) for place in cell)
            category_id = rng.choice([3, 7])
            color = COLORS["red" if category_id == 3 else "blue"]
            image[:, y : y + h, x : x + w] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, **box})
        write_png(image, str(folder / "images" / f"{image_id}.png"))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": size, "height": size})
    categories = [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "shapes.json").write_text(json.dumps(content))
    return folder / "shapes.json", folder / "images"


def imagenet(network: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Weights in ImageNet's place. With frozen norms that norm nothing, the sums of a random ResNet would grow."""
    torch.manual_seed(0)
    state = network().state_dict()
    return {name: 0.2 * x if name.endswith(("bn2.weight", "bn3.weight")) else x for name, x in state.items()}


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other slow down images this small, and their number changes the last bit of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shapes(tmp_path: Path) -> tuple[Path, Path]:
    return write_shapes(tmp_path / "shapes", count=6)

"""Every script of examples/ runs, as does the first example of README.md."""

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.io import decode_image, write_png
from torchvision.ops import box_iou

from examples import detect_folder, make_fast, own_detector

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def patch(tmp_path) -> Path:
    """A folder with a small part of a photograph, and a file that is no image."""
    image = decode_image(str(detect_folder.PHOTOGRAPHS / "yellowstone.jpg"))
    write_png(image[:, 100:228, 300:428].contiguous(), str(tmp_path / "patch.png"))
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    return tmp_path


def test_every_script_has_a_test():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert all(f"test_{name}" in globals() for name in scripts)


def test_the_first_example_of_the_readme(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    assert len([line for line in code[1].splitlines() if line and not line.startswith(("from", "import"))]) <= 5
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1], names)
    assert len(names["found"]) > 40
    assert decode_image("found.jpg").shape == names["found"].image.shape


def test_detect_folder(patch, tmp_path, capsys):
    detect_folder.main(patch, tmp_path / "out")
    output = capsys.readouterr().out
    assert "broken.jpg: not a readable image" in output
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in coco["images"]] == ["patch.png"]
    assert [category["name"] for category in coco["categories"]] == ["Tree"]
    assert len(coco["annotations"]) >= 3
    assert decode_image(str(tmp_path / "out" / "patch.jpg")).shape == (3, 128, 128)


def test_make_fast(patch, capsys):
    make_fast.main(patch / "patch.png")
    counts = re.findall(r"^(\w+) .* ms, (\d+) trees", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in counts] == ["torchvision", "from_torchvision", "compile_inference"]
    assert int(counts[0][1]) >= 3
    assert counts[0][1] == counts[1][1]


def test_own_detector(capsys):
    own_detector.main(steps=80)
    output = capsys.readouterr().out
    first, *_, last = (float(loss) for loss in re.findall(r"loss (\d\.\d+)", output))
    assert last < first / 5
    truth = torch.tensor(json.loads(re.findall(r"true boxes: (.*)", output)[0]))
    found = [json.loads(box) for box in re.findall(r"found: (\[.*?\])", output)]
    assert (box_iou(truth.float(), torch.tensor(found).float()).amax(dim=1) > 0.6).all()
    assert {"bright", "dark"} == set(re.findall(r"\], (\w+), score", output))


def test_fine_tune(shapes, tmp_path, capsys):
    from examples import fine_tune  # imports Lightning

    annotations, images = shapes
    fine_tune.main(annotations, images, tmp_path / "run", steps=2)
    assert "6 images of red, blue" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.pt").is_file()

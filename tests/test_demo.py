import hashlib
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import decode_image, encode_png

from demo import compare, compare_losses, engine, run, trees
from demo.trees import Picture, split_by_place, tiles
from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.coco import CocoDataset
from retina_fast.data.metrics import CocoMetrics
from retina_fast.predict.evaluate import Evaluation

BOXES = torch.tensor([[5.0, 5, 25, 25], [60, 10, 78, 30], [66, 40, 90, 60], [95, 70, 99, 79]])


def photograph(name: str) -> Picture:
    """A photograph of 80x100 px with a white rectangle in each box."""
    image = torch.zeros(3, 80, 100, dtype=torch.uint8)
    for x1, y1, x2, y2 in BOXES.int().tolist():
        image[:, y1:y2, x1:x2] = 255
    return Picture(name, image, BOXES)


def voc(boxes: torch.Tensor) -> str:
    corners = ("xmin", "ymin", "xmax", "ymax")
    parts = [
        "".join(f"<{name}>{x:.0f}</{name}>" for name, x in zip(corners, box, strict=True)) for box in boxes.tolist()
    ]
    objects = "".join(f"<object><name>Alive</name><bndbox>{part}</bndbox></object>" for part in parts)
    return f"<annotation>{objects}</annotation>"


def test_a_box_goes_to_the_part_that_holds_its_centre():
    left, right = split_by_place(photograph("p"), 0.7)
    assert left.image.shape == (3, 80, 70)
    assert right.image.shape == (3, 80, 30)
    assert left.boxes.tolist() == [[5, 5, 25, 25], [60, 10, 70, 30]]
    assert right.boxes.tolist() == [[0, 40, 20, 60], [25, 70, 29, 79]]


def test_tiles_cover_the_picture_and_their_boxes_follow_the_pixels():
    picture = photograph("p")
    cut = tiles(picture, size=50, stride=25)
    assert len(cut) == len({tile.name for tile in cut}) == 3 * 3
    assert {tuple(tile.image.shape) for tile in cut} == {(3, 50, 50)}
    seen = 0
    for tile in cut:
        for x1, y1, x2, y2 in tile.boxes.int().tolist():
            assert (tile.image[:, y1:y2, x1:x2] == 255).all()
            seen += 1
    assert seen >= len(BOXES)
    assert tiles(picture, size=200, stride=100)[0].boxes.equal(BOXES)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data folder whose cache holds a wheel with small photographs."""
    (tmp_path / "cache").mkdir()
    wheel = tmp_path / "cache" / trees._WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*trees._SPLIT_BY_PLACE, "OSBS_029", "SOAP_061"):
            png = encode_png(photograph(name).image).numpy().tobytes()
            archive.writestr(f"deepforest/data/{name}.png", png)
            archive.writestr(f"deepforest/data/{name}.xml", voc(BOXES))
    monkeypatch.setattr(trees, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return tmp_path


def test_prepare_writes_data_sets_that_can_be_read(root):
    folder = trees.prepare(root)
    counts = {}
    for split in trees.SPLITS:
        data = CocoDataset(folder / f"{split}.json", folder / split)
        assert data.classes == ["Tree"]
        counts[split] = [len(data[i][1]["boxes"]) for i in range(len(data))]
    assert counts == {"train": [2, 2], "heldout": [2, 2], "OSBS_029": [4], "SOAP_061": [4]}
    assert not list(folder.glob("*.partial"))


def test_prepare_does_its_work_once(root, monkeypatch):
    trees.prepare(root)
    monkeypatch.setattr(trees, "_download", lambda cache: pytest.fail("downloaded again"))
    trees.prepare(root)


def test_a_failed_or_damaged_download_says_what_to_do(tmp_path, root, monkeypatch):
    (root / "cache" / trees._WHEEL).write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="is damaged or not the expected file: delete it"):
        trees.prepare(root)
    monkeypatch.setattr(trees.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match=r"could not be downloaded.* Check the network"):
        trees.prepare(tmp_path / "elsewhere")


def test_pictures_show_what_was_found_and_what_was_marked(root, tmp_path):
    folder = trees.prepare(root)
    data = CocoDataset(folder / "OSBS_029.json", folder / "OSBS_029")
    results = [{"image_id": 1, "category_id": 1, "bbox": [30.0, 30, 20, 20], "score": score} for score in (0.9, 0.1)]
    run.draw(data, Evaluation(CocoMetrics({}, {}), results, 1, 300, [], []), tmp_path)
    picture = decode_image(str(tmp_path / "OSBS_029.jpg")).int()
    yellow = (picture[0] > picture[2] + 60) & (picture[1] > picture[2] + 60)
    blue = picture[2] > picture[0] + 60
    assert yellow[32:48, 30].all()
    assert blue[7:23, 5].all()


@pytest.fixture
def model_file(tmp_path) -> Path:
    torch.manual_seed(0)
    builder = "retinanet_resnet18_fpn_lite"
    weights = checkpoint.build(builder, 1).state_dict()
    checkpoint.save(Checkpoint(builder, {}, ["Tree"], [1], weights), tmp_path / "trees.pt")
    return tmp_path / "trees.pt"


def test_both_training_paths_agree(root, model_file, one_thread):
    folder = trees.prepare(root)
    rows = compare.compare(CocoDataset(folder / "train.json", folder / "train"), model_file, steps=3, crop=64)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert compare.difference(rows) < 1e-4


def test_the_demo_prints_one_line_for_the_held_out_parts(root, model_file, monkeypatch, capsys):
    monkeypatch.setattr(run, "TREES", model_file)
    monkeypatch.setattr(run, "prepare", lambda: trees.prepare(root))
    monkeypatch.setattr(run, "OUTPUT", root / "out")
    run.main()
    output = capsys.readouterr().out
    assert len(re.findall(r"^AP50 \d\.\d\d$", output, re.MULTILINE)) == 1
    assert len(re.findall(r"^(?:OSBS_029|SOAP_061), a forest never seen.* \d\.\d\d AP50$", output, re.MULTILINE)) == 2
    assert len(list((root / "out").glob("*.jpg"))) == 4


def test_the_engine_is_compared_with_the_model(root, model_file, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(engine, "TREES", model_file)
    monkeypatch.setattr(engine, "prepare", lambda: trees.prepare(root))
    engine.main(rounds=1)
    output = capsys.readouterr().out
    rows = re.findall(r"^ (?:model|engine), (?:b?float\d\d)( +\d\.\d{4}){3}", output, re.MULTILINE)
    assert len(rows) == 3
    assert len(re.findall(r"scores differ from the model's by at most", output)) == 2
    assert len(re.findall(r"times torchvision's speed$", output, re.MULTILINE)) == 4


def test_the_comparison_of_losses_chooses_by_pixels_that_do_not_train():
    tiles = [(photograph, x) for photograph, xs in (("a", (0, 362)), ("b", (0, 256, 512, 1097))) for x in xs]
    images = [{"id": i, "file_name": f"{name}_{x}_0.png"} for i, (name, x) in enumerate(tiles)]
    content = {"images": images, "annotations": [{"image_id": i} for i in range(len(tiles))], "categories": [1]}
    train_on, choose_by = compare_losses.split(content)
    assert [image["id"] for image in train_on["images"]] == [0, 1, 2, 3, 4]
    assert [box["image_id"] for box in train_on["annotations"]] == [0, 1, 2, 3, 4]
    assert [image["id"] for image in choose_by["images"]] == [5]


def test_the_comparison_of_losses_says_mean_and_range():
    option, *others = compare_losses.OPTIONS
    columns = [f"{name} {metric}" for name in ("chosen by", *trees.SPLITS[1:]) for metric in ("AP50", "AP")]
    lines = [{"option": option, "seed": seed} | dict.fromkeys(columns, str(0.2 + 0.1 * seed)) for seed in range(3)]
    table = compare_losses.table(lines)
    assert [column.header for column in table.columns] == ["option", "seeds", *columns]
    assert [next(iter(column.cells)) for column in table.columns] == [option, "3", *["0.300 (0.200 to 0.400)"] * 8]
    assert list(table.columns[0].cells)[1:] == others

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png
from typer.testing import CliRunner

from retina_fast import cli
from retina_fast.data.errors import UserError
from retina_fast.data.voc import open_data, read_voc

HEIGHT, WIDTH = 48, 64

OBJECTS: dict[str, list] = {
    "2008_000001": [("dog", (11, 5, 30, 24)), ("cat", (1, 1, 64, 48))],
    "2008_000002": [("cat", (2, 2, 20, 20), 1)],
    "2008_000003": [],
}


def xml(name: str, objects: list, size: str = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>") -> str:
    """As VOC's own files: with parts that have boxes of their own."""
    items = ""
    for label, box, *difficult in objects:
        corners = "".join(
            f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        part = f"<part><name>head</name><bndbox>{corners}</bndbox></part>"
        flag = f"<difficult>{difficult[0]}</difficult>" if difficult else ""
        items += f"<object><name>{label}</name>{flag}<bndbox>{corners}</bndbox>{part}</object>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{items}</annotation>"


def write_voc(root: Path, objects: Mapping[str, list], flat: bool = False) -> Path:
    """A folder in VOC's layout, or one of images with the .xml files beside them."""
    annotations, images = (root, root) if flat else (root / "Annotations", root / "JPEGImages")
    for folder in {annotations, images}:
        folder.mkdir(parents=True)
    for name, items in objects.items():
        (annotations / f"{name}.xml").write_text(xml(name, items))
        write_png(torch.full((3, HEIGHT, WIDTH), 90, dtype=torch.uint8), str(images / f"{name}.png"))
    if not flat:
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "train.txt").write_text("2008_000001\n2008_000003\n")
        (root / "ImageSets" / "Main" / "cat_val.txt").write_text("2008_000002  1\n\n")
    return root


@pytest.mark.parametrize("flat", [False, True])
def test_boxes_labels_and_images(flat, tmp_path):
    data = open_data(write_voc(tmp_path / "voc", OBJECTS, flat))
    assert (data.classes, data.category_ids, len(data)) == (["cat", "dog"], [1, 2], 3)
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    # Counted from 1, the last pixel included: 11 to 30 are twenty pixels from 10 on.
    assert target["boxes"].tolist() == [[10, 4, 30, 24], [0, 0, 64, 48]]
    assert target["labels"].tolist() == [1, 0]
    assert data[2][1]["boxes"].shape == (0, 4)


def test_difficult_objects_are_not_learnt_and_do_not_count(tmp_path):
    data = open_data(write_voc(tmp_path / "voc", OBJECTS))
    assert len(data[1][1]["boxes"]) == 0
    assert [box["iscrowd"] for box in data.coco["annotations"]] == [0, 0, 1]


def test_a_list_of_images_is_a_split_with_the_classes_of_the_whole_folder(tmp_path):
    root = write_voc(tmp_path / "voc", OBJECTS)
    train = open_data(root / "ImageSets" / "Main" / "train.txt")
    val = open_data(root / "ImageSets" / "Main" / "cat_val.txt")
    assert [record["file_name"] for record in train.images] == ["2008_000001.png", "2008_000003.png"]
    assert [record["file_name"] for record in val.images] == ["2008_000002.png"]
    assert train.classes == val.classes == ["cat", "dog"]
    (root / "mine.txt").write_text("2008_000003")
    assert len(open_data(root / "mine.txt")) == 1


def test_given_classes_decide_the_labels(tmp_path):
    root = write_voc(tmp_path / "voc", OBJECTS)
    assert open_data(root, classes=["dog", "fox", "cat"])[0][1]["labels"].tolist() == [0, 2]
    with pytest.raises(UserError, match=r"2008_000001\.xml: object 1 is a 'dog', not one of cat"):
        open_data(root, classes=["cat"])


def test_pixels_counted_from_0_are_warned_of(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("cat", (0, 3, 20, 20))]})
    with pytest.warns(UserWarning, match="counts from 1: boxes may be a pixel off"):
        read_voc(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_voc(write_voc(tmp_path / "other", {"a": [("cat", (1, 1, 20, 20))]}))


def test_faulty_files_are_named(tmp_path):
    root = write_voc(tmp_path / "voc", OBJECTS)
    file = root / "Annotations" / "2008_000002.xml"
    file.write_text(xml("2008_000002", [("cat", (1, 1, "", 4))]))
    with pytest.raises(UserError, match=f"{file}: object 1 has no numbers as xmin"):
        open_data(root)
    file.write_text("<annotation>")
    with pytest.raises(UserError, match=f"{file}: not an XML file"):
        open_data(root)
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: no such file, but .*cat_val.txt names it"):
        open_data(root / "ImageSets" / "Main" / "cat_val.txt")
    with pytest.raises(UserError, match=r"holds no \.xml file"):
        open_data(tmp_path)


def test_external_entities_are_not_followed(tmp_path):
    root = write_voc(tmp_path / "voc", OBJECTS)
    (tmp_path / "secret").write_text("cat")
    doctype = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path / "secret"}">]>'
    file = root / "Annotations" / "2008_000002.xml"
    file.write_text(doctype + xml("2008_000002", [("&x;", (1, 1, 9, 9))]))
    with pytest.raises(UserError, match=f"{file}: not an XML file"):
        open_data(root)


def test_a_file_without_a_size_takes_that_of_its_image(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("cat", (1, 1, 9, 9))]}, flat=True)
    (root / "a.xml").write_text(xml("a", [("cat", (1, 1, 9, 9))], size="<size><width>0</width></size>"))
    assert open_data(root)[0][1]["boxes"].canvas_size == (HEIGHT, WIDTH)


def test_files_in_deeper_folders_are_not_passed_over_in_silence(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("cat", (1, 1, 9, 9))]})
    (root / "Annotations" / "front").mkdir()
    (root / "Annotations" / "front" / "b.xml").write_text(xml("b", [("cat", (1, 1, 9, 9))]))
    with pytest.warns(UserWarning, match=r"Annotations: 1 \.xml files in folders in it are not read, as .*b\.xml"):
        assert len(open_data(root)) == 1


def test_train_and_evaluate_take_voc(one_thread, tmp_path):
    objects = {name: [("cat", (5, 5, 30, 30)), ("dog", (35, 10, 60, 40))] for name in "abc"}
    root = write_voc(tmp_path / "voc", objects)
    (root / "val.txt").write_text("b")
    run = ("--output", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--crop", 64, "--workers", 0)
    trained = invoke("train", "--voc", root, "--val-voc", root / "val.txt", *run)
    assert trained.exit_code == 0, trained.output
    result = invoke("evaluate", "--voc", root, "--checkpoint", tmp_path / "run" / "model.pt", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "over 3 images" in " ".join(result.output.split())


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

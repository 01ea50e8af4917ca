"""What was found: it filters, draws, converts and saves itself, and is the same whichever detector found it."""

import copy
import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.io import write_png

import retina_fast
from retina_fast.data.errors import ImageError, UserError
from retina_fast.predict import load as loading
from retina_fast.predict.georeference import Georeference
from retina_fast.predict.outputs import write
from retina_fast.predict.predict import detector_of, predict
from retina_fast.predict.results import Results
from tests.predict.test_sources import files, model, photo, write_geotiff  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
UTM = Georeference((0.5, 0.0, 1000.0, 0.0, -0.5, 2000.0), "EPSG:32611")


def some(path: str | None = "photos/a.png", **options) -> Results:
    boxes = torch.tensor([[10.0, 20, 30, 60], [0, 0, 8, 8], [40, 40, 50, 50]])
    scores, labels = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([1, 0, 1])
    image = torch.full((3, 80, 100), 90, dtype=torch.uint8)
    about: dict[str, Any] = {
        "classes": ["Bush", "Tree"],
        "category_ids": [4, 7],
        "path": path,
        "image": image,
    } | options
    return Results(boxes, scores, labels, (80, 100), **about)


def test_it_says_what_was_found():
    assert repr(some()) == "<Results photos/a.png, 100x80 pixels: 2 Tree, 1 Bush>"
    assert repr(some(path=None)[:0]) == "<Results 100x80 pixels: nothing>"
    assert repr(some("a\nb.png", classes=())) == r"<Results a\nb.png, 100x80 pixels: 2 class 1, 1 class 0>"


def test_slices_and_filters():
    results = some()
    assert [len(results[:2]), len(results[results.scores > 0.5]), len(results[[2]]), len(results[-1])] == [2, 2, 1, 1]
    assert [one.scores.item() for one in results] == pytest.approx([0.9, 0.6, 0.3])
    assert results[-1].labels.tolist() == [1]
    trees = results.filter(score=0.5, classes="Tree")
    assert trees.counts() == {"Tree": 1}
    assert (trees.path, trees.size, trees.category_ids) == (results.path, results.size, results.category_ids)
    assert len(results.filter(classes=["Tree", "Bush"])) == len(results.filter()) == 3
    assert len(results.filter(classes=[])) == 0
    with pytest.raises(ValueError, match="classes must be some of Bush, Tree, got 'Cat'"):
        results.filter(classes="Cat")
    with pytest.raises(IndexError, match="there are 3 objects, got the index 3"):
        results[3]
    assert results[::-1].scores.tolist() == results.scores.flip(0).tolist()
    assert results[5:].boxes.shape == (0, 4)
    assert results[range(0, 3, 2)].labels.tolist() == [1, 1]
    for which in (None, "a", 0.5, (0, 1)):
        with pytest.raises(TypeError, match="objects are given by an index, slice, boolean mask or list of indices"):
            results[which]


def test_tables():
    pandas = pytest.importorskip("pandas")
    frame = some().to_dataframe()
    assert list(frame.columns) == ["path", "class", "label", "score", "xmin", "ymin", "xmax", "ymax"]
    assert frame[frame["class"] == "Tree"].xmax.tolist() == [30, 50]
    assert isinstance(frame, pandas.DataFrame)
    assert list(some()[:0].to_dataframe().columns) == list(frame.columns)


def test_supervision_takes_results_and_torchvisions_dicts():
    sv = pytest.importorskip("supervision")
    found = some().to_supervision()
    assert found.data["class_name"].tolist() == ["Tree", "Bush", "Tree"]
    assert found[found.confidence > 0.5].xyxy.tolist() == [[10, 20, 30, 60], [0, 0, 8, 8]]
    assert len(some()[:0].to_supervision()) == 0
    theirs = {name: value.numpy() for name, value in some().detections().items()}
    by_hand = sv.Detections(xyxy=theirs["boxes"], confidence=theirs["scores"], class_id=theirs["labels"])
    assert by_hand.class_id.tolist() == found.class_id.tolist()


@pytest.mark.parametrize("name", ["pandas", "supervision"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    convert = {"pandas": some().to_dataframe, "supervision": some().to_supervision}[name]
    with pytest.raises(UserError, match=f"needs {name}: pip install {name}"):
        convert()


def test_coco():
    coco = some().to_coco(image_id=5)
    assert coco["images"] == [{"id": 5, "file_name": "photos/a.png", "height": 80, "width": 100}]
    assert coco["categories"] == [{"id": 4, "name": "Bush"}, {"id": 7, "name": "Tree"}]
    first = coco["annotations"][0]
    assert (first["id"], first["image_id"], first["category_id"], first["bbox"]) == (1, 5, 7, [10, 20, 20, 40])
    assert first["area"] == 800


def area(ring: list) -> float:
    """Of a polygon; positive if it is counterclockwise (the shoelace formula)."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(ring)) / 2


def test_geojson_has_the_coordinates_of_the_map():
    content = some(georeference=UTM).to_geojson()
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32611"
    feature = content["features"][0]
    (ring,) = feature["geometry"]["coordinates"]
    assert ring == [[1005, 1990], [1005, 1970], [1015, 1970], [1015, 1990], [1005, 1990]]
    assert area(ring) == 200  # m2: 20 by 40 pixels of 0.5 m
    assert feature["properties"] == {"path": "photos/a.png", "class": "Tree", "label": 1, "score": pytest.approx(0.9)}
    south_up = some(georeference=Georeference((0.5, 0.0, 1000.0, 0.0, 0.5, 2000.0), "EPSG:4326")).to_geojson()
    assert area(south_up["features"][0]["geometry"]["coordinates"][0]) == 200
    assert "crs" not in south_up
    with pytest.raises(UserError, match=r"photos/a\.png: has no georeference"):
        some().to_geojson()


def test_a_reduced_picture_shows_the_same_places():
    whole, small = some(georeference=UTM), some(georeference=UTM).reduced(50)
    assert (small.size, small.image.shape, small.plot().size) == ((40, 50), (3, 40, 50), (50, 40))
    assert torch.equal(small.boxes, whole.boxes / 2)
    assert small.to_geojson() == whole.to_geojson()
    assert whole.reduced(100) is whole


def test_a_geotiff_is_read_with_its_place(photo, tmp_path):  # noqa: F811
    from retina_fast.predict.georeference import georeference

    write_geotiff(photo, tmp_path / "map.tif")
    place = georeference(tmp_path / "map.tif")
    assert place is not None
    assert place.crs == "EPSG:32611"
    assert place.transform == pytest.approx((0.1, 0, 500000, 0, -0.1, 4100000))
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.tif")
    (tmp_path / "damaged.tif").write_bytes((tmp_path / "map.tif").read_bytes()[:40])
    assert georeference(tmp_path / "plain.tif") is georeference(tmp_path / "damaged.tif") is None


def test_files_by_suffix(tmp_path):
    results = [some(georeference=UTM), Results.unread(ImageError("b.png: gone"), "b.png"), some(georeference=UTM)]
    for suffix in ("json", "csv", "geojson", "html"):
        for _ in range(2):  # the second replaces the first
            write(results, tmp_path / f"all.{suffix}")
    coco = json.loads((tmp_path / "all.json").read_text())
    assert [image["id"] for image in coco["images"]] == [1, 3]
    assert [box["id"] for box in coco["annotations"]] == list(range(1, 7))
    with (tmp_path / "all.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["class"] for row in rows] == ["Tree", "Bush", "Tree"] * 2
    content = json.loads((tmp_path / "all.geojson").read_text())
    assert len(content["features"]) == 6
    assert content["crs"] == results[0].to_geojson()["crs"]
    write(some(), tmp_path / "alone.json")
    assert len(json.loads((tmp_path / "alone.json").read_text())["images"]) == 1
    some().save(tmp_path / "one.txt")
    assert (tmp_path / "one.txt").read_text().splitlines()[0] == "1 0.200000 0.500000 0.200000 0.500000 0.900000"
    for suffix in ("jpg", "PNG", "webp"):
        some().save(tmp_path / f"one.{suffix}")
        with Image.open(tmp_path / f"one.{suffix}") as picture:
            assert picture.size == (100, 80)
    assert not list(tmp_path.glob("*.partial"))


def test_files_that_cannot_be_written(tmp_path):
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "a.png"))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png: would replace the image itself"):
        some(path=str(tmp_path / "a.png")).save(tmp_path / "." / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    with pytest.raises(UserError, match=r"the suffix must be one of \.json, \.csv"):
        some().save(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match="holds the results of one image, got those of 2"):
        write([some(), some()], tmp_path / "a.txt")
    with pytest.raises(UserError, match="no such folder"):
        some().save(tmp_path / "none" / "a.csv")
    other = some("c.png", georeference=Georeference(UTM.transform, "EPSG:32612"))
    with pytest.raises(UserError, match=r"c\.png: has another coordinate system"):
        write([some(georeference=UTM), other], tmp_path / "a.geojson")
    assert not (tmp_path / "a.geojson").exists()
    with pytest.raises(UserError, match="pixels of the image are not at hand"):
        some(image=None).plot()


class Page(HTMLParser):
    """The elements of a page, which must be closed as they were opened, and its texts by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def test_names_are_text_in_a_page_whatever_they_hold(tmp_path):
    evil = "</title></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> & \u6728"
    results = some(evil, classes=[evil, "Tree"])
    results.save(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("script"), tags.count("img"), tags.count("rect"), tags.count("figure")) == (1, 1, 3, 1)
    assert not [value for _, attrs in page.tags for name, value in attrs.items() if name.startswith("on")]
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image["alt"] == evil
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert sum(evil in text for _, text in page.texts) >= 3  # at its box, in the legend and under the picture
    assert all("alert" not in text for tag, text in page.texts if tag == "script")
    labels = [attrs["value"] for tag, attrs in page.tags if tag == "input" and attrs["type"] == "checkbox"]
    assert labels == ["0", "1"]
    rect = next(attrs for tag, attrs in page.tags if tag == "rect")
    assert (rect["x"], rect["width"], rect["data-score"]) == ("10.0", "20.0", "0.9000")


# The detector behind it


def test_threads_take_turns(photo):  # noqa: F811
    model = retina_fast.load("trees").cpu()  # noqa: F811
    photos = [photo, photo.flip(1), photo.flip(2), photo[:, :64]]
    expected = [model.predict(image, score=0.05) for image in photos]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda image: model.predict(image, score=0.05), photos * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)


def test_names_that_are_no_list_are_refused(photo):  # noqa: F811
    model = retina_fast.load("trees").cpu()  # noqa: F811
    model.classes = "Tree"
    with pytest.raises(TypeError, match="classes must be a list of names, got 'Tree'"):
        model.predict(photo)


def test_the_engine_is_made_once_and_again_when_the_model_has_changed(photo):  # noqa: F811
    model = retina_fast.load("trees").cpu()  # noqa: F811
    engine = detector_of(model)
    assert detector_of(model) is engine
    before = model.predict(photo)
    with torch.no_grad():  # by the side of autograd, which counts no new version of the weights
        model.head.classification_head.cls_logits.bias.data -= 1.0
    after = model.predict(photo)
    assert detector_of(model) is not engine
    assert len(after) < len(before)
    (direct,) = model([photo / 255])
    assert len(after) == int((direct["scores"] >= 0.3).sum())
    model.nms_thresh = 0.0
    assert detector_of(model).nms_thresh == 0.0
    assert len(model.predict(photo, score=0.01)) > len(after)  # below the model's own threshold
    assert model.score_thresh == 0.05
    engine = detector_of(model)
    with torch.no_grad():
        next(model.parameters()).neg_()  # a hash by exclusive or stays the same
    assert detector_of(model) is not engine


def test_without_an_engine_it_is_the_model_itself(photo):  # noqa: F811
    model = retina_fast.load("trees").cpu()  # noqa: F811
    by_engine, by_model = model.predict(photo), model.predict(photo, engine=False)
    (direct,) = model([photo / 255])
    keep = direct["scores"] >= 0.3
    assert torch.equal(by_model.boxes, direct["boxes"][keep])
    assert len(by_engine) == len(by_model)
    torch.testing.assert_close(by_engine.scores, by_model.scores, atol=0.05, rtol=0)

    model.register_forward_hook(lambda module, inputs, outputs: [{k: v[:1] for k, v in x.items()} for x in outputs])
    assert detector_of(model) is model
    assert len(model.predict(photo)) == 1
    with pytest.raises(ValueError, match="training mode: call its eval"):
        model.train().predict(photo)


def test_engines_and_copies_know_the_names(model, photo):  # noqa: F811
    engine = retina_fast.compile_inference(model)
    assert engine.classes == model.classes == copy.deepcopy(model).classes == ["Tree"]
    assert repr(engine.predict(photo)) == repr(model.predict(photo))
    assert copy.deepcopy(model).set_num_classes(1).classes is None
    theirs = retina_fast.convert.to_torchvision(model)
    assert repr(predict(theirs, photo)) == repr(model.predict(photo))


def test_load_says_what_it_takes(tmp_path, monkeypatch):
    from retina_fast.predict.load import TREES

    assert retina_fast.load(str(TREES)).classes == ["Tree"]
    for name, message in {
        "none.pt": "no such model file, and no name of one: trees",
        "x" * 5000: "no such model file",
        str(tmp_path): "is a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            retina_fast.load(name)
    monkeypatch.setattr(loading, "load_published", lambda *names: (names, None))
    assert retina_fast.load("retinanet_resnet50_fpn_v2") == ("retinanet_resnet50_fpn_v2", "COCO_V1")

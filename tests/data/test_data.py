import bisect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional

from retina_fast.data.augment import (
    ColorJitter,
    Flips,
    RandomTranspose,
    ScaledCrop,
    TrainingSet,
    augmentation,
    batches,
    whole_images,
)
from retina_fast.data.coco import CocoDataset, Tried, plain, read_image
from retina_fast.data.errors import ImageError, UserError
from tests.conftest import COLORS


def edit(json_file: Path, change) -> None:
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


def test_labels_are_contiguous_in_the_order_of_the_category_ids(shapes):
    dataset = CocoDataset(*shapes)
    assert (dataset.classes, dataset.category_ids) == (["red", "blue"], [3, 7])
    for i in range(len(dataset)):
        image, target = dataset[i]
        assert image.dtype == torch.uint8
        for box, label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            inside = image[:, box[1] : box[3], box[0] : box[2]]
            assert inside.flatten(1).unique(dim=1).T.tolist() == [list(COLORS[dataset.classes[label]])]


def test_crowds_are_left_out_of_targets_but_not_of_the_evaluation(shapes):
    edit(shapes[0], lambda content: content["annotations"][0].update(iscrowd=1))
    dataset = CocoDataset(*shapes)
    assert len(dataset[0][1]["boxes"]) == 1
    assert len(dataset.coco["annotations"]) == 12


def test_boxes_without_an_extent_are_left_out_and_named(shapes):
    def change(content):
        content["annotations"][1]["bbox"] = [5, 5, 0, 4]
        content["annotations"][3]["bbox"] = [5, 5, float("nan"), 4]

    edit(shapes[0], change)
    with pytest.warns(UserWarning, match=r"2 boxes without an extent .* are left out: annotation 2, annotation 4"):
        dataset = CocoDataset(*shapes)
    assert len(dataset[0][1]["boxes"]) == 1


def test_an_image_without_annotations_has_no_boxes(shapes):
    edit(shapes[0], lambda content: content.update(annotations=[]))
    target = CocoDataset(*shapes)[0][1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "has no list called 'annotations'"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c["images"][0].pop("file_name"), "an entry of 'images' has no 'file_name'"),
        (lambda c: c["annotations"][2].update(image_id=99), "annotation 3 belongs to image 99"),
        (lambda c: c["annotations"][2].update(category_id=1), "annotation 3 has category 1"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2]), r"annotation 3 has bbox \[1, 2\]"),
    ],
)
def test_a_faulty_file_is_named_with_its_faulty_entry(shapes, change, message):
    edit(shapes[0], change)
    with pytest.raises(UserError, match=f"{shapes[0]}.*{message}"):
        CocoDataset(*shapes)


def test_files_that_are_missing_or_no_json_are_named(shapes, tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file"):
        CocoDataset(tmp_path / "none.json", shapes[1])
    with pytest.raises(UserError, match="no such folder of images"):
        CocoDataset(shapes[0], tmp_path / "none")
    with pytest.raises(UserError, match="not a JSON file"):
        CocoDataset(next(shapes[1].glob("*.png")), shapes[1])


def test_images_that_cannot_be_read_are_named(shapes):
    dataset = CocoDataset(*shapes)
    (shapes[1] / "1.png").unlink()
    (shapes[1] / "2.png").write_bytes((shapes[1] / "2.png").read_bytes()[:200])
    (shapes[1] / "3.png").write_text("no image")
    write_png(torch.zeros(3, 10, 20, dtype=torch.uint8), str(shapes[1] / "4.png"))
    tried = Tried(dataset)
    errors = [tried[i] for i in range(len(tried)) if isinstance(tried[i], ImageError)]
    patterns = ["1.png: no such", "2.png: not a readable", "3.png: not a readable", "4.png: is 20x10, but"]
    assert all(pattern in str(error) for pattern, error in zip(patterns, errors, strict=True))


def test_every_kind_of_image_becomes_rgb(tmp_path):
    grey = torch.full((1, 4, 6), 200, dtype=torch.uint8)
    write_png(grey, str(tmp_path / "grey.png"))
    write_jpeg(grey, str(tmp_path / "grey.jpg"))
    for name in ("grey.png", "grey.jpg"):
        image = read_image(tmp_path / name)
        assert (image.shape, image.dtype) == ((3, 4, 6), torch.uint8)
        assert (image == 200).all()


def painted(height: int = 90, width: int = 120) -> tuple[tv_tensors.Image, dict]:
    """A black image with rectangles of distinct colours, and their boxes."""
    boxes = torch.tensor([[10.0, 12, 40, 30], [60, 50, 100, 80], [70, 5, 90, 40]])
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        image[channel, y1:y2, x1:x2] = 255
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.arange(3), "path": "painted"}


def extent(mask: Tensor) -> list[float]:
    rows, columns = mask.nonzero().T
    return [float(x) for x in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "transform", [augmentation(64, flips=Flips.ALL).transforms, augmentation(0, flips=Flips.ALL).transforms]
)
def test_boxes_follow_the_pixels(transform, seed):
    torch.manual_seed(seed)
    image, target = painted()
    for step in transform[:-1]:  # without the colours
        image, target = step(image, target)
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        assert torch.tensor(box).sub(torch.tensor(extent(image[label] > 127))).abs().max() <= 1
    assert target["boxes"].canvas_size == tuple(image.shape[1:])


def test_a_crop_drops_boxes_that_it_hardly_shows(monkeypatch):
    monkeypatch.setattr("retina_fast.data.augment._SCALES", (1.0, 1.0))
    kept: list[float] = []
    dropped: list[float] = []
    for seed in range(200):
        torch.manual_seed(seed)
        image, target = ScaledCrop(50)(*painted())
        for label, area in enumerate((30 * 18, 40 * 30, 20 * 35)):
            visible = float((image[label] > 127).sum()) / area
            (kept if label in target["labels"].tolist() else dropped).append(visible)
    assert min(kept) >= 0.35 > max(dropped)
    assert len(kept) > 50


def test_a_crop_of_a_smaller_image_is_padded():
    image, target = ScaledCrop(400)(*painted())
    assert image.shape == (3, 400, 400)
    assert len(target["boxes"]) == 3
    assert (image.sum(dim=0) == 0).any()


def test_flips_and_transposes_give_all_eight_views():
    image, target = painted(60, 60)
    steps = augmentation(0, flips=Flips.ALL).transforms[:-1]
    assert any(isinstance(step, RandomTranspose) for step in steps)
    torch.manual_seed(0)
    views = set()
    for _ in range(200):
        view = (image, target)
        for step in steps:
            view = step(*view)
        views.add(view[0].numpy().tobytes())
    assert len(views) == 8


COLOURS = torch.randint(40, 160, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def jittered(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) -> Tensor:
    jitter = ColorJitter((brightness, brightness), (contrast, contrast), (saturation, saturation), hue=0)
    jitter.ranges = (*jitter.ranges[:3], (hue, hue))
    return jitter(tv_tensors.Image(COLOURS), {})[0].as_subclass(Tensor)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.4])
@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
def test_colour_factors_are_torchvisions(what, factor):
    expected = getattr(functional, f"adjust_{what}")(COLOURS, factor)
    clipped = (expected == 0) | (expected == 255)
    assert (jittered(**{what: factor}).int() - expected.int())[~clipped].abs().max() <= 1


def test_hue_turns_the_chroma_and_keeps_the_luma():
    yiq = ColorJitter._YIQ
    before, after = (yiq @ x.flatten(1).float() for x in (COLOURS, jittered(hue=0.08)))
    assert (after[0] - before[0]).abs().max() <= 1
    turned = torch.atan2(after[2], after[1]) - torch.atan2(before[2], before[1])
    strong = before[1:].norm(dim=0) > 30
    off = (turned - 2 * torch.pi * 0.08 + torch.pi) % (2 * torch.pi) - torch.pi
    assert off[strong].abs().max() < 0.06
    assert (jittered(hue=1.0).int() - COLOURS.int()).abs().max() <= 1
    grey = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    jitter = ColorJitter((1, 1), (1, 1), (0.3, 1.7), 0.5)
    assert torch.equal(jitter(grey, {})[0], grey)


def test_colours_are_drawn_from_their_ranges():
    torch.manual_seed(0)
    jitter = ColorJitter((0.6, 1.4), (1, 1), (1, 1), 0)
    means = [float(jitter(torch.full((3, 2, 2), 100, dtype=torch.uint8), {})[0].float().mean()) for _ in range(200)]
    assert 60 <= min(means) < 65
    assert 135 < max(means) <= 140
    bright = ColorJitter((9, 9), (1, 1), (1, 1), 0)(COLOURS, {})[0]
    assert bright.min() == 255


def test_an_item_depends_on_seed_epoch_and_index_alone(shapes):
    dataset = CocoDataset(*shapes)
    first = TrainingSet(dataset, augmentation(64, flips=Flips.ALL), seed=5)
    state = torch.random.get_rng_state()
    image, target = first[2, 4]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(image, first[3, 4][0])
    assert not torch.equal(image, TrainingSet(dataset, augmentation(64, flips=Flips.ALL), seed=6)[2, 4][0])
    for workers in (0, 2):
        loader = DataLoader(first, batch_size=None, sampler=[(0, 1), (2, 4)], num_workers=workers, collate_fn=plain)
        other, other_target = list(loader)[1]
        assert torch.equal(image, other)
        assert torch.equal(target["boxes"], other_target["boxes"])


def test_batches_pass_over_every_image_and_can_start_anywhere():
    whole = list(batches(length=5, batch_size=3, seed=1, steps=range(10)))
    assert list(batches(length=5, batch_size=3, seed=1, steps=range(7, 10))) == whole[7:]
    keys = [key for batch in whole for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in range(6) for i in range(5)]
    assert len({tuple(i for _, i in keys[start : start + 5]) for start in range(0, 30, 5)}) > 3  # reshuffled


@pytest.mark.parametrize(
    ("kinds", "size"),
    [([0, 1, 2] * 4, 2), ([0, 1] * 5 + [2], 2), ([0, 1, 2] * 4 + [0], 3), ([0, 1] * 3 + [2], 3)],
)
def test_batches_begin_with_a_group_of_one_kind_in_every_epoch(kinds, size):
    length = len(kinds)
    arguments: dict = {
        "length": length,
        "batch_size": 2 * size,
        "seed": 1,
        "kinds": kinds,
        "group_size": size,
    }
    whole = list(batches(**arguments, steps=range(length)))
    assert list(batches(**arguments, steps=range(2, 4))) == whole[2:4]
    keys = [key for batch in whole for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in range(2 * size) for i in range(length)]
    for epoch in range(2 * size):
        groups = [keys[start : start + size] for start in range(0, len(keys), size)]
        inside = [[kinds[i] for _, i in group] for group in groups if {e for e, _ in group} == {epoch}]
        possible = sum(kinds.count(kind) // size for kind in range(3))
        assert possible - 1 <= sum(len(set(group)) == 1 for group in inside) <= possible
    first = [[key for key in keys if key[0] == epoch] for epoch in range(2 * size)]
    assert len({tuple(i for _, i in keys) for keys in first}) > size  # reshuffled


def test_aspects_are_torchvisions_groups(shapes):
    shape_of = {0: (500, 1000), 1: (998, 2000), 2: (400, 400), 3: (630, 500), 4: (625, 500), 5: None}

    def change(content):
        for record in content["images"]:
            del record["height"], record["width"]
            if shape := shape_of[record["id"]]:
                record["height"], record["width"] = shape

    edit(shapes[0], change)
    bins = (2 ** np.linspace(-1, 1, 7)).tolist()
    expected = [bisect.bisect_right(bins, h / w) for h, w in (shape or (1, 1) for shape in shape_of.values())]
    assert CocoDataset(*shapes).aspects() == expected == [1, 0, 4, 5, 4, 4]


def test_images_without_objects_can_be_left_out(shapes):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (0, 4)]
        content["annotations"][0]["iscrowd"] = content["annotations"][1]["iscrowd"] = 1  # all of image 1

    edit(shapes[0], change)
    whole = CocoDataset(*shapes)
    kept = whole.with_objects()
    assert [record["id"] for record in kept.images] == [2, 3, 5]
    assert [record["id"] for record in kept.coco["images"]] == [2, 3, 5]
    assert len(whole) == len(whole.coco["images"]) == 6
    for index, original in enumerate((2, 3, 5)):
        (image, target), (same, expected) = kept[index], whole[original]
        assert torch.equal(image, same)
        assert target["path"] == expected["path"]
        assert torch.equal(target["boxes"], expected["boxes"])
        assert torch.equal(target["labels"], expected["labels"])
    edit(shapes[0], lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match=r"shapes\.json: not one image has a box to learn from"):
        CocoDataset(*shapes).with_objects()


def test_whole_images_keep_their_pixels_and_boxes_end_with_them():
    image = tv_tensors.Image(torch.arange(3 * 20 * 30, dtype=torch.uint8).view(3, 20, 30))
    corners = torch.tensor([[-2.0, 3, 12, 22], [28, 5, 29, 9], [30, 5, 40, 9]])
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(20, 30))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3])}
        picture, found = whole_images(0, Flips.HORIZONTAL)(image, target)
        mirrored = not torch.equal(picture, image)
        assert torch.equal(picture, image.flip(-1)) == mirrored
        seen.add(mirrored)
        expected = [[18, 3, 30, 20], [1, 5, 2, 9]] if mirrored else [[0, 3, 12, 20], [28, 5, 29, 9]]
        assert found["boxes"].tolist() == expected
        assert found["labels"].tolist() == [1, 2]
    assert seen == {True, False}


def test_an_unreadable_image_is_replaced_in_training(shapes):
    dataset = CocoDataset(*shapes)
    training_set = TrainingSet(dataset, augmentation(0, flips=Flips.NONE), seed=0)
    (shapes[1] / "5.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"5\.png: not a readable image .*another image takes its place"):
        assert training_set[0, 5][1]["image_id"] == 0
    for path in shapes[1].glob("*"):
        path.unlink()
    with (
        pytest.warns(UserWarning, match="another image"),
        pytest.raises(UserError, match="not one of its 6 images can be read"),
    ):
        training_set[0, 0]

"""Some of the objects of results, by whatever a person indexes with, and results of several models in one file."""

import csv

import numpy as np
import pytest
import torch

from retina_fast.data.errors import ImageError, UserError
from retina_fast.predict.outputs import write
from retina_fast.predict.results import Results

SCORES = torch.tensor([0.9, 0.8, 0.5, 0.3])


def results(classes=("Tree", "Bush"), path=None, count=4):
    boxes = torch.tensor([[0.0, 0, 8, 8], [1, 1, 3, 3], [2, 2, 9, 9], [5, 5, 17, 12]])[:count]
    labels = torch.tensor([0, 1, 0, 1])[:count]
    image = torch.zeros(3, 12, 17, dtype=torch.uint8)
    return Results(boxes, SCORES[:count], labels, (12, 17), classes, path=path, image=image)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (-1, [3]),
        (np.int64(1), [1]),
        (np.array(2), [2]),
        (torch.tensor(2), [2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (range(2), [0, 1]),
        ([3, -4], [3, 0]),
        ([True, False, True, False], [0, 2]),
        ([torch.tensor(1), torch.tensor(2)], [1, 2]),
        (np.argsort(SCORES.numpy())[::-1], [0, 1, 2, 3]),
        (np.array([False, True, False, True]), [1, 3]),
        (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
        ([], []),
        (np.array([]), []),
    ],
    ids=repr,
)
def test_an_index(which, expected):
    found = results()[which]
    assert torch.equal(found.scores, SCORES[expected])
    assert len(found.boxes) == len(found.labels) == len(expected)


@pytest.mark.parametrize(
    "which", [True, torch.tensor(True), np.bool_(True), torch.tensor(1.0), 1.0, [1.0], "Tree", None]
)
def test_what_is_no_index(which):
    """A single truth value, such as `found.scores.max() > 0.5`, is not the object 1."""
    with pytest.raises(TypeError, match="objects are given by an index, slice"):
        results()[which]


def test_more_that_is_no_index():
    for masks in (torch.tensor([1, 0, 1, 0], dtype=torch.uint8), torch.ones(4, 4, dtype=torch.bool), [[0, 1]], (1, 2)):
        with pytest.raises(TypeError, match="objects are given by an index, slice"):
            results()[masks]
    for which, message in ((4, "the index 4"), ([0, -5], "the index -5"), ([True], "a mask of 1")):
        with pytest.raises(IndexError, match=f"there are 4 objects, got {message}"):
            results()[which]
    with pytest.raises(IndexError, match="there are 0 objects, got the index 0"):
        results(count=0)[0]


def test_filters_are_checked():
    for score in (-0.1, 2, float("nan"), "0.5", None):
        with pytest.raises(UserError, match="score must be at least 0 and at most 1"):
            results().filter(score=score)
    with pytest.raises(TypeError, match="classes must be one or several names, got 0"):
        results().filter(classes=0)
    with pytest.raises(UserError, match="longest must be at least 1 pixel, got 0"):
        results().reduced(0)


def test_results_of_different_models_are_not_written_as_one(tmp_path):
    several = [results(), results(["Bush", "Tree"])]
    for name in ("a.json", "a.html"):
        with pytest.raises(UserError, match="results of different classes"):
            write(several, tmp_path / name)
    write(several, tmp_path / "a.csv")  # where each line has its class's name
    write([results([], count=0), results([])], tmp_path / "a.json")  # classes that nobody has named
    assert (
        '"categories": [{"id": 0, "name": "class 0"}, {"id": 1, "name": "class 1"}]'
        in (tmp_path / "a.json").read_text()
    )


def test_an_image_that_could_not_be_read_has_no_text(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png: no such image file"):
        Results.unread(ImageError("a.png: no such image file"), "a.png").save(tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists()


def test_a_name_that_is_no_text(tmp_path):
    """File systems allow names that are not UTF-8; Python holds the bytes as surrogates."""
    for suffix in ("csv", "json", "html"):
        write([results(path="photo\udcff.png")], tmp_path / f"a.{suffix}")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {r"photo\udcff.png"}

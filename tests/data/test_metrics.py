import pytest
import torch
from torchvision.io import decode_image

from retina_fast.data.coco import as_results
from retina_fast.data.metrics import RECALLS, coco_metrics, plot_precision_recall

COCO = {
    "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
    "categories": [{"id": number, "name": str(number)} for number in (1, 2, 3)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 50, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [20, 20, 40, 40], "area": 1600, "iscrowd": 0},
    ],
}


def found():
    """Of class 1 one object of two, then a false one; of class 2 its object, by an IoU of 0.6; class 3 has none."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [80, 80, 90, 90], [20, 20, 44, 60]])
    detections = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 0, 1])}
    return coco_metrics(COCO, as_results(detections, 1, [1, 2, 3]), [1], 100)


def test_curves_are_means_over_the_classes_that_have_objects():
    half = [1.0 if recall <= 0.5 else 0.0 for recall in RECALLS]
    curves = found().precision
    assert curves["IoU 0.50"] == pytest.approx([(x + 1) / 2 for x in half])
    assert curves["IoU 0.75"] == pytest.approx([x / 2 for x in half])
    assert curves["IoU 0.50:0.95"] == pytest.approx([x / 2 + 0.3 / 2 for x in half])


def test_their_means_are_the_average_precisions():
    metrics = found()
    for name, curve in (("AP50", "IoU 0.50"), ("AP75", "IoU 0.75"), ("AP", "IoU 0.50:0.95")):
        assert sum(metrics.precision[curve]) / 101 == pytest.approx(metrics.values[name])


def test_they_are_drawn(tmp_path):
    plot_precision_recall(found(), tmp_path / "a.png")
    assert decode_image(str(tmp_path / "a.png")).float().std() > 10
    nothing = coco_metrics(COCO | {"annotations": []}, [], [1], 100)
    assert nothing.precision == {}
    plot_precision_recall(nothing, tmp_path / "b.png")

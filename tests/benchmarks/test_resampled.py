"""The bootstrap of AP50: its AP is COCO's, and its interval holds what noise does."""

from typing import Any

import torch

from benchmarks.models.resampled import ap50, average_precision, interval, matched, together
from retina_fast.data.metrics import coco_metrics


def forest(seed, trees=60, images=2):
    """True boxes, and detections of most of them with false ones between, in COCO's form."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        true = torch.cat((900 * rand(trees, 2), 20 + 30 * rand(trees, 2)), dim=1)
        moved = true + 0.25 * true[:, 2:].repeat(1, 2) * (rand(trees, 4) - 0.5)
        false = torch.cat((900 * rand(trees, 2), 20 + 30 * rand(trees, 2)), dim=1)
        for box in true.tolist():
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
        scores = torch.cat((0.2 + 0.8 * rand(trees), 0.7 * rand(trees))).tolist()
        for box, score in zip([*moved.tolist(), *false.tolist()], scores, strict=True):
            if rand(1) < 0.8:
                results.append({"image_id": image, "category_id": 1, "bbox": box, "score": score})
    coco = {"images": [{"id": i + 1} for i in range(images)], "annotations": annotations, "categories": [{"id": 1}]}
    return coco, results


def test_ap50_is_cocos():
    coco, results = forest(0)
    found = matched(results, coco)
    ones = torch.ones(1, len(found.scores)), torch.ones(1, len(found.of_truths))
    expected = coco_metrics(coco, results, [1, 2], 300).values["AP50"]
    assert 0.3 < expected < 0.95
    assert abs(float(average_precision(found, *ones)) - expected) < 1e-6
    twice = average_precision(found, 2 * ones[0], 2 * ones[1])  # nothing changes if each counts twice
    assert abs(float(twice) - expected) < 0.02


def test_sets_of_photographs_together_are_judged_as_one():
    (coco, results), (other, others) = forest(0), forest(3, trees=20, images=3)
    shifted: dict[str, Any] = {"images": [*coco["images"], *({"id": image["id"] + 2} for image in other["images"])]}
    moved = [[entry | {"image_id": entry["image_id"] + 2} for entry in rows] for rows in (other["annotations"], others)]
    shifted["annotations"] = coco["annotations"] + moved[0]
    none = matched([], {"images": [{"id": 1}], "annotations": []})
    joined = together([matched(results, coco), none, matched(others, other)])
    expected = matched(results + moved[1], shifted)
    assert ap50(joined) == ap50(expected)
    assert len(joined.squares.unique(dim=0)) == len(expected.squares.unique(dim=0))
    assert len(joined.of_truths.unique(dim=0)) == len(expected.of_truths.unique(dim=0))


def test_the_interval_tells_noise_from_a_loss():
    coco, results = forest(1)
    exact = matched(results, coco)
    assert interval(exact, exact) == (0.0, 0.0)
    generator = torch.Generator().manual_seed(2)
    noisy = [
        dict(result, score=result["score"] + 0.02 * float(torch.randn(1, generator=generator))) for result in results
    ]
    low, high = interval(matched(noisy, coco), exact)
    assert low < 0 < high
    assert high - low < 6
    worse = [result for i, result in enumerate(results) if i % 4]
    low, high = interval(matched(worse, coco), exact)
    assert high < 0


def test_nothing_found_is_an_ap50_of_0():
    coco, results = forest(3)
    nothing = matched([], coco)
    low, high = interval(nothing, matched(results, coco))
    assert -100 < low < high < -30

"""The tables of docs/coco.md are what `benchmarks.predict.cost` prints, and it counts the real networks' arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.predict import cost
from benchmarks.predict.cost import Training
from retina_fast import retinanet_resnet50_fpn

PAGE = (Path(__file__).parents[2] / "docs" / "coco.md").read_text()


def test_the_page_shows_what_is_computed():
    for table in (cost.coco_table, cost.growth_table):
        assert "\n".join(table(cost.MEASURED_RATE)) in PAGE


@pytest.mark.parametrize(("width", "classes"), [(800, 91), (1088, 91), (800, 7)])
def test_convolutions_are_counted_right(width, classes):
    model = retinanet_resnet50_fpn(weights_backbone=None, num_classes=classes).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        features = list(model.backbone(torch.empty(1, 3, 800, width, device="meta")).values())
        model.head(features)
    expected = counter.get_total_flops() / 1e9
    assert Training(width=width, classes=classes).forward_gflop == pytest.approx(expected, rel=0.01)


def test_hours():
    run = Training(width=800)
    assert run.rate(420) == pytest.approx(420)
    assert run.hours(420, 1) == pytest.approx(117_266 * 26 / 420 / 3600)
    assert run.hours(420, 8) == pytest.approx(run.hours(420, 1) / 8)
    assert replace(run, images=10).hours(420, 1) < replace(run, images=20).hours(420, 1)


def test_other_rates_are_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cost", "--rate", "300"])
    cost.main()
    assert "| at 300 img/s of 800x800 | 221 |" in capsys.readouterr().out

"""`make demo`: finds trees in photographs that the detector was not trained on, and measures how well.

It prints the COCO metrics of the embedded weights on the held-out parts, and writes pictures to out/demo with the
detections in yellow and the annotated boxes in blue.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torchvision.io import write_jpeg

from demo.trees import prepare
from retina_fast.commands.evaluate import print_evaluation
from retina_fast.data.coco import CocoDataset
from retina_fast.predict.draw import draw_boxes
from retina_fast.predict.evaluate import Evaluation, evaluate
from retina_fast.predict.load import TREES, load_model

OUTPUT = Path("out/demo")
_SCORE = 0.3
_FOUND, _MARKED = "#F0E442", "#56B4E9"


def main() -> None:
    console = Console()
    folder = prepare()
    model, content = load_model(TREES)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for split in ("heldout", "OSBS_029", "SOAP_061"):
        data = CocoDataset(folder / f"{split}.json", folder / split)
        evaluation = evaluate(model, content.classes, data, workers=0, console=console)
        assert evaluation
        if split == "heldout":
            console.print("The held-out right parts of the two training photographs:")
            print_evaluation(evaluation, console)
        else:
            console.print(f"{split}, a forest never seen in training: {evaluation.metrics.values['AP50']:.2f} AP50")
        draw(data, evaluation, OUTPUT)
    console.print(f"Pictures are in {OUTPUT}: found in yellow (score {_SCORE} and above), marked by people in blue")


def draw(data: CocoDataset, evaluation: Evaluation, folder: Path) -> None:
    """Write a picture for each image of the data, with its annotated boxes and its detections, into `folder`."""
    for i, record in enumerate(data.images):
        image, target = data[i]
        found = [r for r in evaluation.results if r["image_id"] == record["id"] and r["score"] >= _SCORE]
        boxes = torch.tensor([r["bbox"] for r in found]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        picture = image.as_subclass(Tensor)
        for these, color in ((target["boxes"], _MARKED), (boxes, _FOUND)):
            picture = draw_boxes(picture, these, [color] * len(these))
        write_jpeg(picture, str(folder / f"{data.path(i).stem}.jpg"), quality=90)


if __name__ == "__main__":
    main()

"""Fine-tune a detector on your own data, in the COCO or the Pascal VOC format.

    python -m examples.fine_tune train.json images/ runs/mine
    python -m examples.fine_tune VOC2012/ VOC2012/JPEGImages runs/mine

It needs `pip install '.[all]'`. The command `retina-fast train` has every option, and goes on after a stop.
"""

import sys
from pathlib import Path

from rich.console import Console

from retina_fast.data.voc import open_data
from retina_fast.predict.load import load_model
from retina_fast.train import TrainSettings, train

MODEL = "retinanet_resnet18_fpn_lite"  # small; retinanet_resnet50_fpn_v2 is torchvision's better one


def main(annotations: Path, images: Path, output: Path, steps: int = 1000) -> None:
    data = open_data(annotations, images)
    print(f"{len(data)} images of {', '.join(data.classes)}")
    settings = TrainSettings(model=MODEL, steps=steps).resolve(data)  # fills in all that was not given
    weights = train(settings, data, output=output, console=Console())  # model.pt; the folder has curves and logs
    model, content = load_model(weights)
    print(f"{weights}: {sum(p.numel() for p in model.parameters()):,} parameters, detects {', '.join(content.classes)}")


if __name__ == "__main__":
    annotations, images, output = map(Path, sys.argv[1:4])
    main(annotations, images, output)

"""Find objects in a folder of images; save a picture of each, and everything that was found as JSON.

    python -m examples.detect_folder [folder] [new folder]

The command `retina-fast detect` does the same for any number of images, and in several processes.
"""

import json
import sys
from pathlib import Path

from torchvision.io import write_jpeg

import retina_fast
from retina_fast.data.errors import ImageError
from retina_fast.data.images import read_image
from retina_fast.predict.draw import above, draw_detections
from retina_fast.predict.images import image_files, picture_names
from retina_fast.predict.load import TREES, load_model

PHOTOGRAPHS = Path(__file__).parent / "photographs"


def main(folder: Path = PHOTOGRAPHS, output: Path = Path("out/detect_folder")) -> None:
    model, content = load_model(TREES)  # or the model.pt of a training run
    engine = retina_fast.compile_inference(model)
    if output.exists():
        sys.exit(f"{output}: is there already: give the name of a new folder, so that nothing is replaced")
    output.mkdir(parents=True)
    results = []
    for path, name in picture_names(image_files([folder])):
        try:
            image = read_image(path)  # (3, H, W) uint8
        except ImageError as error:
            print(f"warning: {error}")
            continue
        found = above(engine([image])[0], score=0.3)
        write_jpeg(draw_detections(image, found, content.classes), str(output / f"{name}.jpg"))
        for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
            results.append({"image": path.name, "class": content.classes[label], "score": score, "box_xyxy": box})
        print(f"{path.name}: {len(found['boxes'])} found")
    (output / "detections.json").write_text(json.dumps(results, indent=1))
    print(f"Wrote pictures and detections.json into {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

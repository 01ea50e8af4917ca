"""Find objects in a folder of images; save a picture of each, and everything that was found as JSON and as a web page.

    python -m examples.detect_folder [folder] [new folder]

The command `retina-fast detect` does the same for any number of images, and in several processes.
"""

import sys
import warnings
from pathlib import Path

import retina_fast
from retina_fast.predict.image_files import picture_names
from retina_fast.predict.outputs import write

PHOTOGRAPHS = Path(__file__).parent / "photographs"


def main(folder: Path = PHOTOGRAPHS, output: Path = Path("out/detect_folder")) -> None:
    if output.exists():
        sys.exit(f"{output}: is there already: give the name of a new folder, so that nothing is replaced")
    output.mkdir(parents=True)
    model = retina_fast.load("trees")  # or the model.pt of a training run
    with warnings.catch_warnings(action="ignore"):  # of files that cannot be read: they are printed below
        every = model.predict(folder, score=0.3)
    for results in every:
        print(results)
    read = {Path(results.path): results for results in every if not results.error}
    for path, name in picture_names(read):
        read[path].save(output / f"{name}.jpg")
    write(read.values(), output / "detections.json")
    write(read.values(), output / "detections.html")
    print(f"Wrote pictures, detections.json and detections.html into {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

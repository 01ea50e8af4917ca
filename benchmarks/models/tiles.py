"""A raster made of tree photographs, through the embedded detector tile by tile: time, memory, a kill, and the seams.

`python -m benchmarks.models.tiles` writes a GeoTIFF of 20,000 x 20,000 pixels into a temporary folder and detects in it
in a process of its own, which is killed when a third of the rows of tiles are finished, and started again. It prints
the peak of memory beyond the loaded engine, and compares the boxes that one tile alone sees with a single pass over
that tile. Then it plants an object on every seam and every corner of the tiles of a raster of that size, and counts
which of them are lost or doubled. It needs rasterio.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_fast import compile_inference
from retina_fast.data.images import read_image
from retina_fast.predict.geotiff import RasterFile
from retina_fast.predict.load import TREES, load_model
from retina_fast.predict.tiles import Tiles, Window, detect_tiles
from tests.instruments.planted import find, label_of

PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "examples" / "photographs").glob("*.jpg"))
TILE, OVERLAP = 800, 0.2
COMPARED = 6  # tiles
SIDE = 60  # px of a planted object


def write_raster(path: Path, size: int, strip: int = 512) -> None:
    """Writes a JPEG-compressed GeoTIFF of photographs, each turned about at random, edge to edge."""
    import rasterio

    rng = random.Random(0)
    photographs = [read_image(file) for file in PHOTOGRAPHS]
    place = rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 4_000_000)
    profile: dict[str, Any] = {"driver": "GTiff", "height": size, "width": size, "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": strip, "blockysize": strip, "compress": "jpeg", "photometric": "ycbcr"}
    with rasterio.open(path, "w", crs="EPSG:32611", transform=place, **profile | layout) as file:
        for y in range(0, size, strip):
            row: list[Tensor] = []
            while sum(piece.shape[2] for piece in row) < size:
                photograph = rng.choice(photographs)
                top = rng.randrange(max(1, photograph.shape[1] - strip + 1))
                piece = photograph[:, top : top + strip]
                piece = piece.flip(rng.sample((1, 2), rng.randint(0, 2)))
                row.append(piece.repeat(1, -(-strip // piece.shape[1]), 1)[:, :strip])
            height = min(strip, size - y)
            pixels = torch.cat(row, dim=2)[:, :height, :size]
            file.write(pixels.numpy(), window=rasterio.windows.Window(0, y, size, height))


def peak_mb() -> float:
    """Returns the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def detect(path: Path, rows: Path, out: Path, batch: int) -> None:
    """Detects in the raster, in this process, and writes what was found and what it took."""
    model = load_model(TREES)[0].cpu()
    engine = compile_inference(model, dtype=torch.float32)

    def run(tiles: list[Tensor]) -> Any:
        return engine(tiles)

    with RasterFile(path) as raster:
        tiles = Tiles(raster.height, raster.width, TILE, OVERLAP)
        window = tiles.row(0)[0]
        run([raster.read(window)] * batch)
        before, start = peak_mb(), time.perf_counter()
        found = detect_tiles(run, raster, TILE, OVERLAP, batch_size=batch, resume=rows, about="embedded")
        seconds, beyond = time.perf_counter() - start, peak_mb() - before
        wrong = sum(differs(run, raster, tiles, found, k) for k in range(COMPARED))
    told = {"objects": len(found["boxes"]), "seconds": seconds, "beyond_mb": beyond, "loaded_mb": before}
    out.write_text(json.dumps(told | {"compared": COMPARED, "wrong": wrong}))


def differs(run: Any, raster: RasterFile, tiles: Tiles, found: dict[str, Tensor], seed: int) -> bool:
    """Returns whether the boxes that one tile alone sees are others than a single pass over it gives."""
    rng = random.Random(seed)
    row, column = rng.randrange(len(tiles.rows)), rng.randrange(len(tiles.columns))
    window: Window = tiles.row(row)[column]
    (alone,) = run([raster.read(window)])
    boxes = alone["boxes"] + torch.tensor([window.x, window.y] * 2)
    own = boxes[~tiles.shared(boxes, torch.full((len(boxes),), column), row)]
    left, top = window.x, window.y
    inside = (found["boxes"][:, :2] >= torch.tensor([left, top])).all(dim=1)
    inside &= (found["boxes"][:, 2:] <= torch.tensor([left + window.width, top + window.height])).all(dim=1)
    theirs = found["boxes"][inside]
    theirs = theirs[~tiles.shared(theirs, torch.full((len(theirs),), column), row)]
    if len(own) != len(theirs):
        return True
    order, other = (rows[:, 0].sort(stable=True).indices for rows in (own, theirs))
    return not torch.allclose(own[order], theirs[other], atol=1e-2)


def on_seams(size: int) -> list[tuple[int, int, int, int]]:
    """Returns boxes on every edge and corner of the tiles, cut by it in different ways, none of which touch."""
    starts = Tiles(size, size, TILE, OVERLAP).rows
    seams = sorted({edge for start in starts for edge in (start, start + TILE)})
    along = [min(max(0, seam - 5 - 10 * (k % 5)), size - SIDE) for k, seam in enumerate(seams)]
    clear = [at for at, after in pairwise([*along, 2 * size]) if after - at > SIDE]
    return [(x, y, x + SIDE, y + SIDE) for y in clear for x in clear]


def plant_raster(path: Path, size: int, boxes: list[tuple[int, int, int, int]], strip: int = 512) -> None:
    """Writes a black GeoTIFF with the n-th box in a colour that says n."""
    import rasterio

    profile: dict[str, Any] = {"driver": "GTiff", "height": size, "width": size, "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": strip, "blockysize": strip, "compress": "deflate"}
    with rasterio.open(path, "w", **profile | layout) as file:
        for y in range(0, size, strip):
            pixels = torch.zeros(3, min(strip, size - y), size, dtype=torch.uint8)
            for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
                if y1 < y + strip and y2 > y:
                    colour = torch.tensor([number // 256, number % 256, 255], dtype=torch.uint8)
                    pixels[:, max(0, y1 - y) : max(0, y2 - y), x1:x2] = colour[:, None, None]
            file.write(pixels.numpy(), window=rasterio.windows.Window(0, y, size, pixels.shape[1]))


def print_planted(size: int) -> None:
    """Prints how many planted objects were lost or doubled."""
    boxes = on_seams(size)
    planted: Counter[tuple[int, ...]] = Counter((*box, label_of(number)) for number, box in enumerate(boxes, start=1))
    with tempfile.TemporaryDirectory() as folder:
        plant_raster(Path(folder) / "planted.tif", size, boxes)
        with RasterFile(Path(folder) / "planted.tif") as raster:
            found = detect_tiles(find, raster, TILE, OVERLAP)
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)
    seen: Counter[tuple[int, ...]] = Counter((*map(int, box), label) for box, label in rows)
    print(f"{len(boxes)} planted: {(planted - seen).total()} lost, {(seen - planted).total()} doubled or wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000, help="of the raster, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="how many tiles at once")
    parser.add_argument("--detect", nargs=3, metavar=("RASTER", "ROWS", "OUT"), help="one run, in this process")
    arguments = parser.parse_args()
    if arguments.detect:
        raster, rows, out = map(Path, arguments.detect)
        detect(raster, rows, out, arguments.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        raster, rows, out = (Path(folder) / name for name in ("raster.tif", "rows", "out.json"))
        write_raster(raster, arguments.size)
        number = len(Tiles(arguments.size, arguments.size, TILE, OVERLAP).rows)
        print(f"{arguments.size} x {arguments.size} pixels, {raster.stat().st_size / 2**20:.0f} MB", flush=True)
        command = [sys.executable, "-m", "benchmarks.models.tiles", "--batch", str(arguments.batch)]
        command += ["--detect", *map(str, (raster, rows, out))]
        first = subprocess.Popen(command)
        while first.poll() is None and (not rows.exists() or len(rows.read_bytes().splitlines()) <= number // 3):
            time.sleep(0.5)
        first.kill()
        first.wait()
        print(f"killed after {len(rows.read_bytes().splitlines()) - 1} of {number} rows of tiles", flush=True)
        subprocess.run(command, check=True)
        told = json.loads(out.read_text())
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}: the rest took {told['seconds']:.0f} s")
    print(f"{told['objects']} objects; {told['wrong']} of {told['compared']} tiles differ from a single pass")
    print(f"peak memory: {told['beyond_mb']:.0f} MB beyond the {told['loaded_mb']:.0f} MB with the engine loaded")
    print_planted(arguments.size)


if __name__ == "__main__":
    main()

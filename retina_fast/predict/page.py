"""A web page of detections: one file that holds its pictures, with boxes to switch by class and score."""

from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from torchvision.io import encode_jpeg

from retina_fast.data.files import replacing
from retina_fast.predict.draw import PALETTE

BEGIN = "<!doctype html>\n<!-- written by retina-fast detect -->\n"
"""How every page begins that this module wrote."""

_LONGEST = 1600  # px: the longer side of a picture in the page, twice what a window usually gives it

# No name of a user's reaches the script: it reads numbers alone. The policy keeps the page from loading or sending.
_HEAD = """<html lang="en"><head><meta charset="utf-8"><title>Detections</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { display: flex; flex-direction: column; margin: 0; font: 15px/1.5 system-ui, sans-serif; background: #f4f4f2; }
header { order: -1; position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 20px;
  align-items: center; max-height: 30vh; overflow: auto; padding: 8px 16px; background: #fff;
  border-bottom: 1px solid #ccc; }
header label { white-space: nowrap; } header i { display: inline-block; width: 12px; height: 12px; margin: 0 4px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 16px;
  padding: 16px; }
figure { margin: 0; } figure div { position: relative; } img { display: block; width: 100%; height: auto; }
svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect { fill: transparent; stroke-width: 2; vector-effect: non-scaling-stroke; } rect:hover { stroke-width: 4; }
figcaption { overflow-wrap: anywhere; } [hidden] { display: none; }
</style></head><body><main>
"""
_SCRIPT = """<script>
const score = document.getElementById("score"), boxes = [...document.querySelectorAll("rect")];
const shown = document.getElementById("shown"), least = document.getElementById("least");
function show() {
  const on = new Set([...document.querySelectorAll("input:checked")].map(box => box.value));
  let count = 0;
  for (const box of boxes) {
    const visible = on.has(box.dataset.label) && Number(box.dataset.score) >= Number(score.value);
    box.style.display = visible ? "" : "none";
    count += visible;
  }
  shown.textContent = `${count} of ${boxes.length} boxes`;
  least.textContent = Number(score.value).toFixed(2);
}
document.addEventListener("input", show);
show();
</script></body></html>
"""


@contextmanager
def page(file: Path, *_: object) -> Iterator[Callable[..., None]]:
    """A page, to which the results of one image after another are added.

    Args:
        file: what is there is replaced at the end of the block, unless it fails.

    Example::

        >>> with page(Path("found.html")) as add:  # doctest: +SKIP
        ...     add(results, 1)
    """
    counts: dict[int, int] = {}
    names: dict[int, str] = {}
    least = 1.0

    def add(results: Any, _: int, jpeg: bytes | None = None) -> None:
        nonlocal least
        for row in results.records():
            counts[row["label"]] = counts.get(row["label"], 0) + 1
            names[row["label"]] = row["class"]
            least = min(least, row["score"])
        opened.write(figure(results, jpeg or small_jpeg(results)))

    with replacing(file) as partial, partial.open("w", encoding="utf-8", errors="replace") as opened:
        opened.write(BEGIN + _HEAD)
        yield add
        boxes = "".join(
            f'<label><input type="checkbox" checked value="{label}">'
            f'<i style="background:{PALETTE[label % len(PALETTE)]}"></i>{escape(names[label])} '
            f"({counts[label]})</label>\n"
            for label in sorted(names)
        )
        start = int(least * 100) / 100
        opened.write(
            f'</main><header>{boxes}<label>score at least <input type="range" id="score" min="{start}" max="1" '
            f'step="0.01" value="{start}"> <output id="least"></output></label><span id="shown"></span></header>\n'
        )
        opened.write(_SCRIPT)


def figure(results: Any, jpeg: bytes) -> str:
    """One image of a page: its picture, its boxes as shapes, and its name.

    Args:
        results: a :class:`~retina_fast.predict.results.Results`.
        jpeg: its picture; see :func:`small_jpeg`.

    Example::

        >>> figure(results, small_jpeg(results))[:8]  # doctest: +SKIP
        '<figure>'
    """
    height, width = results.size
    shapes = []
    for row in results.records():
        x, y, right, bottom = (row[name] for name in ("xmin", "ymin", "xmax", "ymax"))
        shapes.append(
            f'<rect data-label="{row["label"]}" data-score="{row["score"]:.4f}" x="{x:.1f}" y="{y:.1f}" '
            f'width="{right - x:.1f}" height="{bottom - y:.1f}" stroke="{PALETTE[row["label"] % len(PALETTE)]}">'
            f"<title>{escape(row['class'])} {row['score']:.2f}</title></rect>"
        )
    name = escape(results.path or "")
    encoded = b64encode(jpeg).decode()
    found = ", ".join(f"{count} {escape(kind)}" for kind, count in results.counts().most_common()) or "nothing"
    return (
        f'<figure><div><img loading="lazy" width="{width}" height="{height}" alt="{name}" '
        f'src="data:image/jpeg;base64,{encoded}"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        f"{''.join(shapes)}</svg></div><figcaption>{name}: {found}</figcaption></figure>\n"
    )


def small_jpeg(results: Any) -> bytes:
    """The picture of an image for the page, no longer than it needs to be.

    Example::

        >>> small_jpeg(results)[:2]  # doctest: +SKIP
        b'\xff\xd8'
    """
    return encode_jpeg(results.reduced(_LONGEST).image.cpu().contiguous(), quality=85).numpy().tobytes()

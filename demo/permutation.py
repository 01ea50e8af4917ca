"""Draws a specification of SpineNet: `python -m demo.permutation [specification.json] [--output picture.png]`.

Blocks stand in the order they are built, at the height of their level; a link runs from each block to those it feeds.
A JSON file holds rows [level, kind, [parent, parent], is_output], or is one that `retina-fast search` wrote. Without
one, the published permutation is drawn.
"""

import argparse
import json
from pathlib import Path

from retina_fast.backbones.specification import KINDS, MOBILE_KINDS, SPINENET, checked
from retina_fast.search.picture import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specification", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/spinenet.png"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.specification.read_text()) if arguments.specification else SPINENET
    if isinstance(rows, dict):
        rows = rows["arguments"]["specification"]
    draw(checked(rows, MOBILE_KINDS if rows[0][1] in MOBILE_KINDS else KINDS), arguments.output)


if __name__ == "__main__":
    main()

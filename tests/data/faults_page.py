"""The tables of `docs/faults.md`, and what check, the loader of train and evaluate do in its words."""

import re
from pathlib import Path

from retina_fast.data.faults import LEFT_OUT, Kind
from tests.data.three import agreed

_PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
_OBJECTS = 6  # of the sound data


def rows(heading: str) -> dict[str, str]:
    """The inputs in the table under a heading of the page, and what happens with each."""
    section = _PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (.+) \| (taken|kept|left out|refused) \|$", section, re.MULTILINE))


def outcome(annotations: Path, images: Path | None = None) -> str:
    """The word of the page for what all three do. Whatever is taken or kept has all its boxes."""
    answer, faults = agreed(annotations, images)
    if answer.refused:
        return "refused"
    if any(fault.kind in LEFT_OUT for fault in faults):
        return "left out"
    assert answer.boxes >= _OBJECTS or any(fault.kind == Kind.NO_BOX for fault in faults)
    return "kept" if faults else "taken"

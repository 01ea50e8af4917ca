"""Plants faults in a copy of the kernels: do the compiled tests fail? python -m tests.ptx.faults [PART ...].

Each fault is a change of a few characters that the interpreter, which runs one program after the other on exact
operations, lets pass or cannot see. It takes some ten seconds for each; PART selects faults whose names contain it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[2]
_COPIED = ("kernels", "retina_fast", "tests")


class Planted(NamedTuple):
    """A fault.

    Args:
        file: of kernels/, in which ``old`` stands once and becomes ``new``.
        case: whose compiled test must fail.
        seen: a pattern of what they must say.
    """

    file: str
    old: str
    new: str
    case: str
    seen: str


FAULTS = {
    "a store out of bounds": Planted(
        "take_kept.py", "mask=valid, other=-1), mask=inside)", "mask=valid, other=-1))", "take_kept",
        "out of bounds|race on new int64",
    ),
    "a load out of bounds": Planted(
        "one_pass.py", "mask = i < end - offset", "mask = i <= end - offset", "one_pass fp32", "out of bounds",
    ),
    "a misaligned load": Planted(
        "candidate_list.py", "shift = ((image * end) & 15).to(tl.int32)", "shift = ((image * end) & 3).to(tl.int32)",
        "candidate_selection bf16 K=91", "misaligned",
    ),
    "a barrier removed": Planted(
        "candidate_list.py", "list_ptr += slot\n                tl.debug_barrier()", "list_ptr += slot",
        "candidate_selection bf16 K=7 mixed",
        "race on",
    ),
    "another barrier removed": Planted(
        "nms_walk.py", "tl.debug_barrier()  # members", "# members", "batched_nms class-agnostic unaligned", "race on",
    ),
    "a load and a store for an atomic": Planted(
        "candidate_search.py", 'tl.atomic_add(count_ptr, total, sem="relaxed")',
        "tl.store(count_ptr, tl.load(count_ptr) + total)",
        "candidate_selection bf16 K=91", "race on",
    ),
    "an atomic whose order shows": Planted(
        "anchor_matching.py", "tl.atomic_max(peaks_ptr", "tl.atomic_xchg(peaks_ptr", "anchor_matching",
        "matches: error",
    ),
    "a read of what nobody wrote": Planted(
        "candidate_search.py", "first.new_zeros(sum(parts)", "first.new_empty(sum(parts)",
        "candidate_selection bf16 K=91", "never written",
    ),
    "another read of what nobody wrote": Planted(
        "anchor_matching.py", "anchors.new_zeros(", "anchors.new_empty(", "anchor_matching",
        "never written",
    ),
    "a tile decided on before all is compared": Planted(
        "nms_tiles.py", "((checked < depth)", "((seen < depth)", "batched_nms chain in tiles", "kept boxes",
    ),
    "results not released": Planted(
        "nms_tiles.py", 'count + 1, sem="release"', 'count + 1, sem="relaxed"', "batched_nms chain in tiles", "race on",
    ),
    "the work of other parts not acquired": Planted(
        "nms_tiles.py", 'left * (2 * TILE), sem="acq_rel"', 'left * (2 * TILE), sem="release"',
        "batched_nms chain in tiles", "race on",
    ),
    "the work of a part not released": Planted(
        "nms_tiles.py", 'left * (2 * TILE), sem="acq_rel"', 'left * (2 * TILE), sem="acquire"',
        "batched_nms chain in tiles", "race on",
    ),
    "results not acquired": Planted(
        "nms_tiles.py", '0, sem="acquire"', '0, sem="relaxed"', "batched_nms chain in tiles", "race on",
    ),
    "a wrong rounding mode": Planted(
        "one_pass.py", "(tl.load(ptr).to(tl.float32) * factor).to(ptr.dtype.element_ty)",
        '(tl.load(ptr).to(tl.float32) * factor).to(ptr.dtype.element_ty, fp_downcast_rounding="rtz")', "one_pass bf16",
        "product: error",
    ),
    "a product contracted into a sum": Planted(
        "anchor_matching.py", "**constants,\n            num_warps=1, enable_fp_fusion=False",
        "**constants,\n            num_warps=1, enable_fp_fusion=True",
        "anchor_matching without low quality", "matches: error",
    ),
}  # fmt: skip


def plant(fault: Planted, folder: Path) -> None:
    """Changes the file in a copy of the kernels.

    Raises:
        ValueError: if the text to be changed does not stand there once.
    """
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {text.count(fault.old)} times {fault.old!r}")
    path.write_text(text.replace(fault.old, fault.new))


def failures(copy: Path, cases: Iterable[str]) -> list[str]:
    """What the compiled tests of these cases, which `make test` runs, say in a copy of the project."""
    tests = [f"tests/kernels/test_{case.split()[0]}.py::test_compiled[{case}]" for case in cases]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), *sys.path[1:]])}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(run.stdout + run.stderr)
    return [line for line in run.stdout.splitlines() if re.match(r"(E  |/.*: (AssertionError|\w+Error))", line)]


def main() -> None:
    parts = sys.argv[1:]
    chosen = {name: fault for name, fault in FAULTS.items() if not parts or any(part in name for part in parts)}
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in _COPIED:
            shutil.copytree(_ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(_ROOT / "pyproject.toml", copy)
        if found := failures(copy, sorted({fault.case for fault in chosen.values()})):
            raise SystemExit(f"without a fault: {found}")
        for name, fault in chosen.items():
            plant(fault, copy / "kernels")
            found = [line for line in failures(copy, [fault.case]) if re.search(fault.seen, line)]
            shutil.copy(_ROOT / "kernels" / fault.file, copy / "kernels")
            missed += [] if found else [name]
            print(f"{name}: {found[0].partition('Error: ')[2][:200] if found else 'NOT SEEN'}", flush=True)
    raise SystemExit(f"not seen: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()

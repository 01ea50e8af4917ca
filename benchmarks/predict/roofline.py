"""A model of an H200: how long a kernel takes.

A kernel takes as long as the slowest of memory, issue slots, special-function unit (MUFU) and its longest program, and
what a launch costs by itself:

    seconds = START + max(bytes / bandwidth, instructions / issue rate, MUFU / its rate, longest program * waves)

Instructions and MUFU are counted in the machine code for sm_90 (`benchmarks.static`), and bytes are those of the
tensors that the launch is given. The scene says how often a loop runs and which part of a tensor is touched.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.predict.executed import mixed_over_background
from benchmarks.static.compiled import Row
from tests.instruments.fake_gpu import Launch, TorchOp

# NVIDIA's H200 data sheet: https://www.nvidia.com/en-us/data-center/h200/
SMS = 132
CLOCK = 67e12 / (2 * 128 * SMS)  # 1.98 GHz: what 67 TFLOP/s of float32 by fma on 128 lanes an SM mean
BANDWIDTH = 0.9 * 4.8e12  # a copy reaches about nine tenths of the data sheet's (assumed)
MATMUL = 0.8 * 989e12  # of dense bf16, what a large product reaches (assumed)
# CUDA C++ Programming Guide, tables of arithmetic instructions and of technical specifications, capability 9.0
ISSUE = 4 * SMS * CLOCK  # instructions of a warp a second: four schedulers an SM, one each a cycle
MUFU = 16 / 32 * SMS * CLOCK  # of a warp: 16 results an SM and cycle
WARPS, REGISTERS, SHARED, BLOCKS = 64, 65536, 233472, 32  # that an SM holds
# https://pmc.ncbi.nlm.nih.gov/articles/PMC10448217/, table 3, H100, in cycles: device memory, L2; and 4 from one
# instruction to the next that needs its result, of which a warp alone on its scheduler is taken to have two under way
DRAM, L2, ALONE = 400, 200, 2.0
REDUCTION = 100  # cycles over the warps of a program: two barriers, two round trips to shared memory of 20 (assumed)
# https://developer.nvidia.com/blog/cuda-graphs/: a kernel of 2.9 us takes 3.8 us in a stream that the host keeps full,
# 3.4 us in a graph
STREAM_GAP, GRAPH_GAP = 0.9e-6, 0.5e-6
START = 1.0e-6  # of a kernel that does nothing: blocks handed out, code fetched, memory flushed (assumed)
# of MATMUL, what cuDNN reaches in whole waves of tiles of so many outputs; it chooses the best of them (assumed)
CONV = {(128, 128): 0.7, (128, 64): 0.6, (64, 64): 0.5}


@dataclass(frozen=True)
class Scene:
    """What the data decide: counts for an image, as a mean or as the most of any program."""

    met: float = 0.0  # ground truths that a tile of anchors meets, on average
    most_met: int = 0  # the most that any tile meets
    ground_truths: int = 0
    foreground: float = 0.0  # share of the tiles of anchors that hold one
    mixed: float = 0.0  # share of the tiles of logits that hold a foreground or an ignored anchor
    survivors: float = 0.0  # share of the logits that exceed the threshold
    candidates: int = 0  # boxes that NMS is given
    members: int = 0  # the most of these that one of its programs decides on
    kept: int = 0  # how many that program keeps
    image_bytes: int = 0  # of images, which are read by address, so that no launch shows them


@dataclass
class Work:
    """The work of one launch. Instructions are counted for a warp and summed over the programs."""

    bytes: float
    instructions: float
    mufu: float = 0.0
    longest: float = 0.0  # cycles of the longest program
    usual: float | None = None  # cycles of the other programs, where they differ


def nbytes(values: Any) -> int:
    """Returns the bytes of the tensors among a launch's arguments, each counted once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, tuple):
            for item in value:
                visit(item)

    visit(tuple(values))
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in found.values())


def _streamed(launch: Launch, row: Row, scene: Scene) -> Work:
    """Every tensor is read or written once, and every program takes the usual path."""
    programs = math.prod(launch.grid)
    longest = row.path * ALONE + DRAM + L2
    return Work(nbytes(launch.args) + scene.image_bytes, programs * row.path, programs * row.path_mufu, longest)


def _focal_loss(launch: Launch, row: Row, scene: Scene) -> Work:
    """Mixed tiles execute more instructions than background tiles, which are the usual path."""
    work, more = _streamed(launch, row, scene), mixed_over_background(launch.args[0][0].dtype)
    return replace(work, instructions=work.instructions * (1 + scene.mixed * (more - 1)))


def _anchor_matching(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program looks through chunks of 32 ground truths, and compares those that it meets with its anchors."""
    programs, chunks = math.prod(launch.grid), math.ceil(scene.ground_truths / 32)
    chunk, pair = row.loops
    anchors, _, boxes, labels, offsets, peaks, indices, classes, *_ = launch.args
    read = nbytes((anchors, boxes, offsets, peaks))
    written = 0 if launch.kwargs["FIND_PEAKS"] else nbytes((labels, indices, classes))
    around = row.path + chunks * chunk
    longest, usual = (
        ALONE * (around + met * pair) + DRAM + chunks * L2 + met * REDUCTION for met in (scene.most_met, scene.met)
    )
    instructions, mufu = programs * (around + scene.met * pair), programs * scene.met * row.loops_mufu[1]
    return Work(read + written, instructions, mufu, longest, usual)


def _scale(launch: Launch, row: Row, scene: Scene) -> Work:
    """The factor is 1, so nothing but the factor is read."""
    return Work(4 * math.prod(launch.grid), 0, 0, DRAM)


def _box_loss(launch: Launch, row: Row, scene: Scene) -> Work:
    """Tiles of background write zeros, and those with a foreground anchor take nearly all of the code."""
    levels, grads, _, _, indices, *_ = launch.args
    programs = math.prod(launch.grid)
    instructions = (1 - scene.foreground) * row.path + scene.foreground * row.code
    size = nbytes((indices, *grads)) + scene.foreground * nbytes(levels)
    return Work(size, programs * instructions, 0, ALONE * row.code + 3 * DRAM)


def _list(launch: Launch, row: Row, scene: Scene) -> Work:
    """The runs of a tile that hold survivors move together, if they are few. Then each lists a survivor a turn, for as
    many turns as the fullest needs, and the survivors are counted in bins."""
    levels, programs, run = launch.args[0], math.prod(launch.grid), launch.kwargs["RUN"]
    runs, lanes = launch.kwargs["TILE"] // run, launch.kwargs["RUNS"]
    turns = _fullest(runs, run, scene.survivors)
    path, counted = float(row.path), 0
    if turns:
        sparse = runs * (1 - (1 - scene.survivors) ** run) <= lanes
        at, counted = (0, math.ceil(scene.survivors * launch.kwargs["TILE"] / lanes)) if sparse else (2, run)
        path = row.through[at] + (turns - 1) * row.loops[at] + counted * row.loops[at + 1]
    written = 8 * scene.survivors * sum(level.numel() for level in levels)
    waits = DRAM + L2 + turns * 2 * L2 + counted * (L2 + REDUCTION)
    return Work(nbytes(levels) + written, programs * path, 0, ALONE * path + waits)


def _fullest(runs: int, length: int, share: float) -> float:
    """Returns the expected survivors of the fullest among `runs` of logits, of which each survives by chance."""
    expected, below = 0.0, 0.0
    for n in range(length):
        below += math.comb(length, n) * share**n * (1 - share) ** (length - n)  # P(at most n)
        expected += 1 - min(1.0, below) ** runs
    return expected


def _search(launch: Launch, row: Row, scene: Scene) -> Work:
    """The first launch reads the lists and appends what stays; the others find nothing left to do. Where the lists are
    too short, the launches read the logits, and two are taken to be needed: higher logits are coarser."""
    levels, digit, (shares, batch), tile = launch.args[0], launch.args[17], launch.grid, launch.kwargs["TILE"]
    programs, listed = math.prod(launch.grid), scene.survivors <= 1 / 32
    if digit > (0 if listed else 1) or not scene.survivors:
        return Work(0, programs * row.path, 0, ALONE * row.path + 2 * L2)
    read = [scene.survivors * level[0].numel() if listed else level[0].numel() for level in levels]  # of an image
    turns = [math.ceil(each / tile) for each in read]
    size = batch * sum(read) * (8 if listed else levels[0].element_size())
    instructions = programs * row.through[0] + batch * sum(turns) * row.loops[0]
    most = max(math.ceil(each / max(1, shares * each // sum(turns))) for each in turns)
    longest = ALONE * (row.through[0] + (most - 1) * row.loops[0])
    return Work(size, instructions, 0, longest + 6 * L2 + 4 * REDUCTION)


def _sort_runs(launch: Launch, row: Row, scene: Scene) -> Work:
    _, batch = launch.grid
    turns = launch.kwargs["RUN"] // launch.kwargs["CHUNK"]
    programs = batch * math.ceil(scene.candidates / launch.kwargs["RUN"])
    path = row.through[0] + (turns - 1) * row.loops[0]
    return Work(16 * batch * scene.candidates, programs * path, 0, ALONE * path + 3 * L2)


def _places(launch: Launch, row: Row, scene: Scene) -> Work:
    """Keys are compared with all keys, or look for their place in each run by binary search, of which each step waits
    for what the step before has read."""
    (_, batch), keys, parts = launch.grid, launch.kwargs["KEYS"], len(launch.args[2]) - 1
    programs = batch * math.ceil(scene.candidates / keys)
    if launch.kwargs["COUNTED"]:
        turns = parts * math.ceil(scene.candidates / parts / launch.kwargs["CHUNK"])
        path = row.through[-1] + (turns - 1) * row.loops[-1] + (parts - 1) * sum(row.loops[:-1])
        waits = (turns + 3) * L2 + parts * REDUCTION
    else:
        turns = launch.kwargs["RUN"].bit_length()
        path, waits = row.through[0] + (turns - 1) * row.loops[0], (turns + 3) * L2
    return Work(16 * batch * scene.candidates, programs * path, 0, ALONE * path + waits)


def _place(launch: Launch, row: Row, scene: Scene) -> Work:
    """What a key stands for is written: an anchor or a box, a score and a label. A box gathers 32 bytes of deltas and
    32 of anchors."""
    work = _places(launch, row, scene)
    decoded = launch.args[6] is not None
    work.bytes += (76 if decoded else 12) * launch.grid[1] * scene.candidates
    work.longest += 2 * DRAM if decoded else 0
    return work


def _box_decode(launch: Launch, row: Row, scene: Scene) -> Work:
    """A box gathers 32 bytes of deltas and 32 of anchors; its index has 8 bytes, and it has 16."""
    _, batch = launch.grid
    return Work(88 * batch * scene.candidates, math.prod(launch.grid) * row.path, 0, ALONE * row.path + 3 * DRAM)


def _suppress(launch: Launch, row: Row, scene: Scene) -> Work:
    """A program goes through the boxes of its classes, 32 at a time, and compares them with those kept so far."""
    deal, compare, *rest = row.loops  # a third settles the tile, unless the compiler has made no loop of it
    settle = sum(rest)
    steps = math.ceil(scene.members / 32)
    compared = sum(math.ceil(scene.kept * step / steps / 32) for step in range(steps))
    dealt = math.ceil(scene.candidates / launch.kwargs["SCAN"])
    keep = row.code - row.path - deal - compare - settle  # what is executed only to decide on a tile
    path = row.path + dealt * deal + steps * (keep + 2 * settle) + compared * compare
    waits = dealt * (2 * L2 + REDUCTION) + steps * (3 * L2 + 6 * REDUCTION) + compared * (2 * L2 + 2 * REDUCTION)
    _, batch = launch.grid
    return Work(32 * batch * scene.candidates, math.prod(launch.grid) * path, 0, ALONE * path + waits)


def _block_bits(launch: Launch, row: Row, scene: Scene) -> Work:
    """Half of the programs compare a word of better boxes with their own; the others end at once."""
    columns, words, batch = launch.grid
    length = 4 * launch.kwargs["BLOCK"] // 32 * launch.kwargs["BLOCK"]
    size = batch * (16 * launch.kwargs["BLOCK"] + length / 2)
    return Work(size, columns * words * batch * (row.code + row.path) / 2, 0, ALONE * row.code + 3 * DRAM + REDUCTION)


def _decide(launch: Launch, row: Row, scene: Scene) -> Work:
    """A warp goes through the words of a block; each waits for the bits, the marks and, to store, the key."""
    block, (batch,) = launch.args[10], launch.grid
    words = math.ceil(min(launch.kwargs["BLOCK"], scene.candidates - block * launch.kwargs["BLOCK"]) / 32)
    turn, *rest = row.loops
    path = row.path + words * (turn + 2 * sum(rest[:-1]))
    size = batch * 32 * words * (9 + 4 * words / 2)
    return Work(size, batch * path, 0, ALONE * path + words * 2 * L2 + DRAM)


def _remove(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program compares its boxes with its share of what a block has kept, 32 at a time."""
    columns, shares, batch = launch.grid
    kept = min(1.0, scene.kept / scene.candidates) * launch.kwargs["BLOCK"]
    turns = math.ceil(kept / 32 / shares)
    path = row.path + turns * row.loops[0]
    size = batch * columns * launch.kwargs["COLUMNS"] * (16 + 1)
    return Work(size, math.prod(launch.grid) * path, 0, ALONE * path + 2 * DRAM + turns * (2 * L2 + REDUCTION))


def _first(launch: Launch, row: Row, scene: Scene) -> Work:
    turns = math.ceil(scene.candidates / launch.kwargs["SCAN"])
    path = row.path + turns * row.loops[0]
    return Work(
        9 * launch.grid[0] * scene.candidates, launch.grid[0] * path, 0, ALONE * path + turns * (L2 + REDUCTION)
    )


def _write_kept(launch: Launch, row: Row, scene: Scene) -> Work:
    """One program an image goes through the flags, and gathers what was kept."""
    first, (batch,) = _first(launch, row, scene), launch.grid
    return replace(first, bytes=batch * (scene.candidates + 150 * launch.args[-1]), longest=first.longest + 2 * DRAM)


def _take_kept(launch: Launch, row: Row, scene: Scene) -> Work:
    """A few hundred boxes an image are gathered."""
    positions = launch.args[3]
    return Work(150 * positions.numel(), math.prod(launch.grid) * row.path, 0, ALONE * row.path + 2 * DRAM)


WORK: dict[str, Callable[[Launch, Row, Scene], Work]] = {
    "_focal_loss_kernel": _focal_loss,
    "_image_batch_kernel": _streamed,
    "_score_keys_kernel": _streamed,
    "_scale_kernel": _scale,
    "_anchor_matching_kernel": _anchor_matching,
    "_box_loss_kernel": _box_loss,
    "_list_kernel": _list,
    "_search_kernel": _search,
    "_sort_runs_kernel": _sort_runs,
    "_sort_kernel": _places,
    "_place_kernel": _place,
    "_box_decode_kernel": _box_decode,
    "_suppress_kernel": _suppress,
    "_block_bits_kernel": _block_bits,
    "_decide_kernel": _decide,
    "_remove_kernel": _remove,
    "_first_kernel": _first,
    "_take_kept_kernel": _take_kept,
    "_write_kept_kernel": _write_kept,
}


@dataclass(frozen=True)
class Step:
    """The time of one kernel, without the gap before it, and what bounds it."""

    name: str
    seconds: float
    bound: str


def kernel_step(launch: Launch, row: Row, scene: Scene) -> Step:
    """Returns the time of one of our kernels."""
    work = WORK[row.kernel](launch, row, scene)
    return Step(row.kernel, *_slowest(bounds(work, row, math.prod(launch.grid))))


def bounds(work: Work, row: Row, programs: int) -> dict[str, float]:
    """Returns the seconds that each limit allows. Programs go to SMs as a whole, so the fullest SM counts."""
    registers = 32 * row.warps * (8 * math.ceil(row.registers / 8))
    held = min(WARPS // row.warps, REGISTERS // registers, SHARED // (row.shared + 1024), BLOCKS)
    fullest = math.ceil(programs / SMS) * SMS / programs
    waves, usual = math.ceil(programs / (SMS * held)), work.longest if work.usual is None else work.usual
    return {
        "memory": work.bytes / BANDWIDTH,
        "issue": fullest * work.instructions * row.warps / ISSUE,
        "MUFU": fullest * work.mufu * row.warps / MUFU,
        "dependent chain": (work.longest + (waves - 1) * usual) / CLOCK,
    }


def torch_step(op: TorchOp) -> Step:
    """Returns the time of an operation of torch: by memory, and for convs by the tensor cores in waves of tiles."""
    limits = {"memory": op.bytes / BANDWIDTH}
    if op.flop:
        batch, channels, *sides = op.shape
        work = op.flop / (batch * math.prod(sides) * channels)  # an output
        limits["tensor cores"] = min(
            work * SMS * rows * columns * _waves(batch * math.prod(sides), rows, channels, columns) / (share * MATMUL)
            for (rows, columns), share in CONV.items()
        )
    return Step(op.name, *_slowest(limits))


def _waves(height: int, rows: int, width: int, columns: int) -> int:
    return math.ceil(math.ceil(height / rows) * math.ceil(width / columns) / SMS)


def _slowest(limits: dict[str, float]) -> tuple[float, str]:
    bound = max(limits, key=lambda name: limits[name])
    return START + limits[bound], bound if limits[bound] > START else "launch"


def total(steps: Sequence[Step], graph: bool) -> float:
    """Returns the seconds of the kernels one after another, as a CUDA graph or launched one by one."""
    return sum(step.seconds + (GRAPH_GAP if graph else STREAM_GAP) for step in steps)

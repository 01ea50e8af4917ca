"""The work of each of our kernels: its bytes, its instructions, and the cycles of its longest program.

Instructions and MUFU are counted in the machine code for sm_90 (`benchmarks.static`), and bytes are those of the
tensors that the launch is given. The scene says how often a loop runs and which part of a tensor is touched.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.predict.executed import instructions_an_element, mixed_over_background
from benchmarks.predict.hardware import ALONE, DRAM, L2, REDUCTION, SMS, held
from benchmarks.static.compiled import Row
from tests.instruments.fake_gpu import Launch

_CHECK = 130  # instructions to see who of a part is left, in the machine code for sm_90


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
    members: int = 0  # the most of these that one of its programs decides on, or that are of one group of classes
    kept: int = 0  # how many that program keeps
    rounds: float = 3  # in which a tile of NMS is settled
    walked: int = 0  # of the candidates, those that programs decide on before they end; 0 if all
    near: float = 0.0  # tiles of 128 anchors whose centres a ground truth meets, on average
    most_near: int = 0  # the most that any ground truth meets
    inside: float = 0.0  # anchors whose centres a ground truth surrounds, on average
    decoded: float = 0.0  # share of these tiles that any ground truth meets
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


def streamed(launch: Launch, row: Row, scene: Scene) -> Work:
    """Every tensor is read or written once, and every program takes the usual path."""
    programs = math.prod(launch.grid)
    longest = row.path * ALONE + DRAM + L2
    return Work(nbytes(launch.args) + scene.image_bytes, programs * row.path, programs * row.path_mufu, longest)


def _focal_loss(launch: Launch, row: Row, scene: Scene) -> Work:
    """Mixed tiles execute more instructions than background tiles, which are the usual path."""
    work, more = streamed(launch, row, scene), mixed_over_background(launch.args[0][0].dtype)
    return replace(work, instructions=work.instructions * (1 + scene.mixed * (more - 1)))


def _image_batch(launch: Launch, row: Row, scene: Scene) -> Work:
    """How often a row of the image is read depends on the scale: as often as for 480x640 pixels made 800."""
    work, options = streamed(launch, row, scene), launch.kwargs
    each = instructions_an_element("image_batch uint8 to bf16", "_image_batch_kernel")
    path = each * options["BLOCK"] * options["ROWS"] / (32 * row.warps)
    return replace(work, instructions=math.prod(launch.grid) * path, longest=path * ALONE + options["ROWS"] * DRAM)


def _anchor_matching(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program looks through its share of the chunks of 32 ground truths, and compares those that it meets with its
    anchors."""
    programs, *_, shares = math.prod(launch.grid), *launch.args
    chunk, pair = row.loops
    around = row.path + math.ceil(scene.ground_truths / 32 / shares) * (chunk + L2 / ALONE)
    longest, usual = (ALONE * (around + met / shares * pair) + DRAM for met in (scene.most_met, scene.met))
    met = programs * scene.met / shares
    return Work(nbytes(launch.args), programs * around + met * pair, met * row.loops_mufu[1], longest, usual)


def _match(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program looks through all chunks of 32 ground truths, and reads anchors again where there is a tie."""
    ties, chunks = row.loops[-1], math.ceil(scene.ground_truths / 32)
    path = row.path - ties + chunks * row.loops[1]
    longest = ALONE * (path + ties) + DRAM + chunks * L2
    return Work(nbytes(launch.args[3:]), math.prod(launch.grid) * path, 0, longest)


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
    """Each thread lists a survivor of each of its words a turn, for as many turns as the fullest word needs. Then keys
    are made of them, and counted in bins. Floors, which spare later programs survivors, are left out. A tile whose
    survivors the list has no room for is counted in wider steps."""
    levels, programs, tile = launch.args[0], math.prod(launch.grid), launch.kwargs["TILE"]
    path, waits = float(row.path), DRAM + L2
    if scene.survivors > 1 / 32:
        counted = tile // launch.kwargs["WIDE"]
        path = row.through[-1] + (counted - 1) * row.loops[-1]
        waits += counted * (L2 + REDUCTION)
    elif scene.survivors:
        turns = _fullest(tile // 32, 32, scene.survivors)
        counted = math.ceil(scene.survivors * tile / launch.kwargs["CHUNK"])
        path = row.through[0] + (turns - 1) * row.loops[0] + counted * row.loops[1]
        waits += 2 * L2 + counted * (2 * L2 + REDUCTION)
    written = 8 * min(1 / 32, scene.survivors) * sum(level.numel() for level in levels)
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
    levels, digit, (shares, batch), tile = launch.args[0], launch.args[-1], launch.grid, launch.kwargs["TILE"]
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
    path = row.through[0] + (turns - 1) * row.loops[0] if row.loops else row.code  # the compiler may unroll the loop
    return Work(16 * batch * scene.candidates, programs * path, 0, ALONE * path + 3 * L2)


def _sort(launch: Launch, row: Row, scene: Scene) -> Work:
    """Keys are compared with all keys, or look for their place in each run by binary search, of which each step waits
    for what the step before has read."""
    (_, batch), keys = launch.grid, launch.kwargs["KEYS"]
    programs = batch * math.ceil(scene.candidates / keys)
    if launch.kwargs["COUNTED"]:
        turns = math.ceil(scene.candidates / launch.kwargs["CHUNK"])
        path, waits = row.through[-1] + (turns - 1) * row.loops[-1], (turns + 3) * L2 + REDUCTION
    else:
        path, waits = row.code, (launch.kwargs["RUN"].bit_length() + 3) * L2  # the search is unrolled
    return Work(16 * batch * scene.candidates, programs * path, 0, ALONE * path + waits)


def _place(launch: Launch, row: Row, scene: Scene) -> Work:
    """A tile's keys are compared with those in the same bins, taken to be a 25th of all, as the goals have them. What a
    key stands for is written: an anchor or a box, a score and a label. A box gathers 32 bytes of deltas and 32 of
    anchors."""
    (_, batch), constants = launch.grid, launch.kwargs
    programs = batch * math.ceil(scene.candidates / constants["KEYS"])
    turns = math.ceil(scene.candidates / 25 / constants["CHUNK"])
    path = row.path if constants["SORTED"] else row.through[0] + (turns - 1) * row.loops[0]
    decoded = launch.args[7] is not None
    size = (92 if decoded else 28) * batch * scene.candidates
    waits = (4 + turns) * L2 + 4 * REDUCTION + (2 * DRAM if decoded else 0)
    return Work(size, programs * path, 0, ALONE * path + waits)


def _box_decode(launch: Launch, row: Row, scene: Scene) -> Work:
    """A box gathers 32 bytes of deltas and 32 of anchors; its index has 8 bytes, and it has 16."""
    _, batch = launch.grid
    return Work(88 * batch * scene.candidates, math.prod(launch.grid) * row.path, 0, ALONE * row.path + 3 * DRAM)


def _suppress(launch: Launch, row: Row, scene: Scene) -> Work:
    """A program goes through the boxes of its classes, 32 at a time, and compares them with those kept so far. After
    each scan it learns whether all have kept enough."""
    deal, compare, *rest = row.loops  # a third settles the tile, unless the compiler has made no loop of it
    settle, lanes, (_, batch) = sum(rest), launch.kwargs["LANES"], launch.grid
    walked = scene.walked or scene.candidates
    dealt = math.ceil(walked / launch.kwargs["SCAN"])
    steps = max(dealt, math.ceil(scene.members / 32))
    compared = sum(math.ceil(scene.kept * step / steps / lanes) for step in range(steps))
    keep = row.through[1] - row.path - compare  # what is executed only to decide on a tile: hardly ever a division
    path = row.path + dealt * deal + steps * (keep + 2 * settle) + compared * compare
    waits = dealt * (3 * L2 + REDUCTION) + steps * (3 * L2 + 6 * REDUCTION) + compared * (2 * L2 + 2 * REDUCTION)
    return Work(32 * batch * walked, math.prod(launch.grid) * path, 0, ALONE * path + waits)


def _deal(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program adds up the sizes of the tiles, and then sorts the boxes of its own by their groups."""
    (tiles, batch), chunk = launch.grid, launch.kwargs["CHUNK"]
    turns = math.ceil(tiles / chunk)
    path = row.path + (turns - 1) * row.loops[0]
    size = batch * (24 * scene.candidates + tiles * 4 * launch.kwargs["GROUPS"])
    return Work(size, tiles * batch * path, 0, ALONE * path + DRAM + 13 * REDUCTION + (turns + 3) * L2)


def _tiles(launch: Launch, row: Row, scene: Scene) -> Work:
    """Parts of tiles are compared with what the tiles before have kept. Of a group, so many tiles keep boxes as there
    are kept boxes, or all; the others' boxes are suppressed by these. Tiles that keep boxes are decided one after
    another; and all parts together take at least their time divided by the programs that run at once."""
    _, batch = launch.grid
    tile, part, rows = (launch.kwargs[name] for name in ("TILE", "PART", "ROWS"))
    item, poll, turn, bits, settle, word = row.loops
    begin, rounds = row.through[0] - item, min(scene.rounds, launch.kwargs["ROUNDS"])  # before the first part
    compare, decide = row.through[1] - begin, row.through[4] - row.through[1] + (rounds - 1) * settle
    groups, tiles = math.ceil(scene.candidates / scene.members), math.ceil(scene.members / tile)
    alive = min(tiles, scene.kept)  # tiles of a group that keep boxes
    decide_time = ALONE * decide + 3 * L2 + (2 + 2 * rounds) * REDUCTION
    if rounds < scene.rounds:  # word after word
        decide += tile // 32 * word
        decide_time += tile // 32 * (ALONE * word + L2 + 3 * REDUCTION)
    parts, turns = math.ceil(scene.members / part) / tiles, math.ceil(scene.kept / alive / rows)
    turn_time, bits_time = (ALONE * each + L2 + REDUCTION for each in (turn, bits))
    check, check_time = _CHECK, ALONE * _CHECK + 2 * REDUCTION
    instructions = time = 0.0
    for depth in range(tiles):
        before = min(depth, alive)
        checks = before.bit_length() + (depth < alive)
        of_part = compare + before * (poll + turns * turn) + checks * check
        part_time = ALONE * (compare + before * poll) + 7 * L2 + DRAM + 4 * REDUCTION
        part_time += before * (L2 + REDUCTION + turns * turn_time) + checks * check_time
        if depth < alive:  # the bits: of the first part one turn, of the last all
            of_part += bits * (1 + parts * part / rows) / 2
            part_time += bits_time * (1 + parts * part / rows) / 2
        instructions += parts * of_part + (decide if depth < alive else 0)
        time += parts * part_time + (decide_time if depth < alive else 0)
    told = 5 * L2 + 3 * REDUCTION  # a part has ended, the last one knows; a tile is decided, those who wait know
    first = ALONE * (begin + compare) + 5 * L2 + DRAM + 4 * REDUCTION + tile / rows * bits_time + told + decide_time
    chain = first + (alive - 1) * (turns * turn_time + check_time + told + decide_time)
    shared_out = batch * groups * time / (SMS * held(row.registers, row.warps, row.shared))
    size = batch * scene.candidates * (50 + 128 * alive / tiles)
    longest = max(chain, shared_out)
    return Work(size, batch * groups * instructions, 0, longest, 0)


def _first(launch: Launch, row: Row, scene: Scene) -> Work:
    """Every program reads the flags, which lie in the L2 after the first, and writes what its own stand for."""
    (programs, batch), read = launch.grid, launch.kwargs["READ"]
    turns = math.ceil(scene.candidates / 4 / read)
    path = row.path + (turns - 1) * row.loops[0]
    size = batch * scene.candidates * (1 + 8 + 8)
    waits = (turns + 2) * L2 + (turns + 3) * REDUCTION
    return Work(size, programs * batch * path, 0, ALONE * path + waits)


def _write_kept(launch: Launch, row: Row, scene: Scene) -> Work:
    """One program an image goes through the flags, and gathers what was kept."""
    (batch,), turns = launch.grid, math.ceil(scene.candidates / launch.kwargs["SCAN"])
    path = row.path + turns * row.loops[0]
    size = batch * (scene.candidates + 150 * launch.args[-1])
    return Work(size, batch * path, 0, ALONE * path + turns * (L2 + REDUCTION) + 2 * DRAM)


def _take_kept(launch: Launch, row: Row, scene: Scene) -> Work:
    """A few hundred boxes an image are gathered."""
    positions = launch.args[3]
    return Work(150 * positions.numel(), math.prod(launch.grid) * row.path, 0, ALONE * row.path + 2 * DRAM)


def _conv_epilogue(launch: Launch, row: Row, scene: Scene) -> Work:
    """Every tensor is read once, and the first is written as well."""
    work = streamed(launch, row, scene)
    return replace(work, bytes=work.bytes + launch.args[0].nbytes)


def _stem_conv(launch: Launch, row: Row, scene: Scene) -> Work:
    """A program reads the weights, and then goes through its share of the tiles."""
    y, (programs,), loop = launch.args[2], launch.grid, max(row.loops)
    tiles = y.numel() / y.shape[1] / launch.kwargs["M"]
    before = row.path - loop
    longest = ALONE * (before + math.ceil(tiles / programs) * loop) + DRAM + L2
    return Work(nbytes(launch.args), programs * before + tiles * loop, 0, longest)


WORK: dict[str, Callable[[Launch, Row, Scene], Work]] = {
    "_focal_loss_kernel": _focal_loss,
    "_image_batch_kernel": _image_batch,
    "_conv_epilogue_kernel": _conv_epilogue,
    "_stem_conv_kernel": _stem_conv,
    "_first_channels_kernel": streamed,
    "_max_pool_relu_kernel": streamed,
    "_score_keys_kernel": streamed,
    "_scale_kernel": _scale,
    "_sum_kernel": streamed,
    "_anchor_matching_kernel": _anchor_matching,
    "_match_kernel": _match,
    "_box_loss_kernel": _box_loss,
    "_list_kernel": _list,
    "_search_kernel": _search,
    "_sort_runs_kernel": _sort_runs,
    "_sort_kernel": _sort,
    "_place_kernel": _place,
    "_box_decode_kernel": _box_decode,
    "_suppress_kernel": _suppress,
    "_count_groups_kernel": streamed,
    "_deal_kernel": _deal,
    "_tiles_kernel": _tiles,
    "_first_kernel": _first,
    "_take_kept_kernel": _take_kept,
    "_write_kept_kernel": _write_kept,
}

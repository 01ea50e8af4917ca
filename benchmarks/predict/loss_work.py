"""The work of the kernels of the matchers and losses that torchvision does not have, as work.py counts it."""

import math
from collections.abc import Callable

from benchmarks.predict.hardware import ALONE, DRAM, L2
from benchmarks.predict.work import Scene, Work, nbytes, streamed
from benchmarks.static.compiled import Row
from tests.instruments.fake_gpu import Launch


def _kept(k: int, count: float) -> float:
    """Returns how often one of `count` numbers in random order is among the k least so far."""
    return min(k, count) + k * math.log(max(1.0, count / k))


def _each_truth(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program serves one ground truth, from its candidates to what is written of each."""
    truths, turns = scene.ground_truths * launch.grid[-1], launch.args[-2] if len(row.loops) > 1 else 1
    path = row.path + row.loops[0] + (turns - 1) * sum(row.loops[1:])
    return Work(64 * truths * launch.kwargs["WIDTH"], truths * path, 0, ALONE * path + DRAM + 3 * L2)


def _nearest(launch: Launch, row: Row, scene: Scene) -> Work:
    """Each program serves one ground truth in one level, and compares the anchors of some four tiles."""
    (_, levels, batch), (box, chunk, tile, replace_one) = launch.grid, row.loops
    path = row.path + box + chunk + 4 * tile + _kept(launch.kwargs["ROOM"], 4 * launch.kwargs["TILE"]) * replace_one
    programs = scene.ground_truths * levels * batch
    return Work(4 * 16 * 256 * programs, programs * path, 0, ALONE * path + DRAM + 5 * L2)


def _predict(launch: Launch, row: Row, scene: Scene) -> Work:
    """All anchors are read; boxes are decoded in the tiles that a ground truth meets."""
    levels, anchors, *_ = launch.args
    programs, rows = math.prod(launch.grid), launch.kwargs["TILE"] // launch.kwargs["ROWS"]
    chunks = math.ceil(scene.ground_truths / launch.kwargs["TILES"])
    around = row.path + chunks * row.loops[0]
    decoding = rows * row.loops[1] if len(row.loops) > 1 else row.code - row.path
    size = nbytes((anchors,)) + scene.decoded * (nbytes(levels) + nbytes((launch.args[5],)))
    instructions = programs * (around + scene.decoded * decoding)
    return Work(size, instructions, 0, ALONE * (around + decoding) + DRAM + (1 + chunks + rows) * L2)


def _align(launch: Launch, row: Row, scene: Scene) -> Work:
    """A program goes through the tiles of its share that meet its ground truth; of an anchor inside it reads a logit,
    a sector of 32 bytes, and a box."""
    (_, shares, batch), (box, chunk, tile, replace_one), k = launch.grid, row.loops, launch.args[12]
    truths = scene.ground_truths * batch
    around, least = row.path + box + chunk, _kept(k, scene.inside / shares)
    instructions = truths * (shares * (around + least * replace_one) + scene.near * tile)
    most = math.ceil(scene.most_near / shares)
    longest = ALONE * (around + most * tile + _kept(k, 128 * most) * replace_one) + most * (DRAM + L2) + 3 * L2
    usual = ALONE * instructions / truths / shares + (1 + scene.near / shares) * (DRAM + L2)
    return Work(truths * scene.inside * 48, instructions, 0, longest, usual)


def _distribution_loss(launch: Launch, row: Row, scene: Scene) -> Work:
    """Tiles of background write zeros, those with a foreground anchor go through their rows."""
    levels, grads, _, _, indices, *_ = launch.args
    programs, turns = math.prod(launch.grid), launch.kwargs["TILE"] // launch.kwargs["ROWS"]
    mixed = row.path + turns * row.loops[0]
    instructions = (1 - scene.foreground) * row.path + scene.foreground * mixed
    size = nbytes((indices, *grads)) + scene.foreground * nbytes(levels)
    return Work(size, programs * instructions, 0, ALONE * mixed + (2 + turns) * DRAM)


def _box_quality(launch: Launch, row: Row, scene: Scene) -> Work:
    """Tiles of background write zeros, and those with a foreground anchor take nearly all of the code."""
    instructions = (1 - scene.foreground) * row.path + scene.foreground * row.code
    size = nbytes((launch.args[3], launch.args[6])) + scene.foreground * nbytes(launch.args[0])
    return Work(size, math.prod(launch.grid) * instructions, 0, ALONE * row.code + 3 * DRAM)


LOSS_WORK: dict[str, Callable[[Launch, Row, Scene], Work]] = {
    "_distribution_loss_kernel": _distribution_loss,
    "_box_quality_kernel": _box_quality,
    "_surround_kernel": streamed,
    "_nearest_kernel": _nearest,
    "_choose_kernel": _each_truth,
    "_predict_kernel": _predict,
    "_align_kernel": _align,
    "_offer_kernel": _each_truth,
    "_write_matches_kernel": streamed,
    "_target_kernel": _each_truth,
}

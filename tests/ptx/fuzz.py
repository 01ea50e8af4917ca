"""Random shapes, arguments and orders, compiled code against the references: python -m tests.ptx.fuzz SEED SECONDS."""

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from retina_fast.kernels.box_loss import LOSS_TYPES
from retina_fast.kernels.conv_epilogue import ACTIVATIONS
from retina_fast.kernels.iou_losses import IOU_LOSSES
from tests.ptx import cases_convs as convs
from tests.ptx import cases_detection as detection
from tests.ptx import cases_losses as losses
from tests.ptx.cases import BF16, F16, F32, run_case

_UINT8 = torch.uint8


_SLACK = 3  # on the limits of the cases, which are for many elements and exact functions


def _shapes(r: random.Random) -> tuple[tuple[int, int], ...]:
    return tuple((r.randint(1, 9), r.randint(1, 9)) for _ in range(r.randint(1, 5)))


def _group_norm(r: random.Random) -> dict[str, Any]:
    groups = r.choice([1, 2, 3, 8])
    return {"groups": groups, "channels": groups * r.choice([1, 2, 3, 8, 16, 21]), "shapes": _shapes(r)}


_DRAWS: dict[Callable[..., Any], Callable[[random.Random], dict[str, Any]]] = {
    losses.focal_loss: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "num_classes": r.choice([3, 5, 17, 90, 91, 128]), "shapes": _shapes(r),
        "gamma": r.choice([2.0, 0.0, 1.5]), "shift": r.choice([0, 1, 3, 8]),
    },
    losses.soft_focal_loss: lambda r: {
        "dtype": r.choice([BF16, F32]), "num_classes": r.choice([3, 17, 91]), "shapes": _shapes(r),
        "loss_type": r.choice(["quality_focal", "varifocal"]), "gamma": r.choice([1.0, 1.5, 2.0]),
        "shift": r.choice([0, 1, 3, 8]),
    },
    losses.box_quality: lambda r: {
        "dtype": r.choice([BF16, F32]), "own": r.random() < 0.5, "shift": r.choice([0, 1, 3]),
        "reg_max": r.choice([0, 0, 1, 16]),
    },
    losses.distribution_loss: lambda r: {
        "dtype": r.choice([BF16, F32]), "loss_type": r.choice([*IOU_LOSSES]), "reg_max": r.choice([1, 3, 7, 16]),
        "shapes": _shapes(r), "shift": r.choice([0, 1, 3]), "weighted": r.random() < 0.5,
    },
    losses.sigmoid_focal_loss: lambda r: {
        "dtype": r.choice([BF16, F32]), "soft": r.random() < 0.5, "gamma": r.choice([2.0, 0.0, 0.7]),
        "count": r.randint(1, 5000), "shift": r.choice([0, 1, 3]),
    },
    losses.box_loss: lambda r: {
        "dtype": r.choice([BF16, F32]), "loss_type": r.choice(LOSS_TYPES), "shapes": _shapes(r),
        "shift": r.choice([0, 1, 3]), "weighted": r.random() < 0.5,
    },
    convs.scale: lambda r: {"dtype": r.choice([BF16, F32]), "shift": r.choice([0, 1, 3])},
    convs.group_norm_relu: lambda r: {"dtype": r.choice([BF16, F32]), "shift": r.choice([0, 1]), **_group_norm(r)},
    convs.conv_epilogue: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "channels": r.choice([1, 36, 64, 819]), "shift": r.choice([0, 1]),
        "activation": r.choice(ACTIVATIONS), "with_bias": r.random() < 0.7, "with_z": r.random() < 0.5,
    },
    convs.epilogue_gradients: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "channels": r.choice([1, 36, 64, 99]), "shift": r.choice([0, 1]),
        "with_relu": r.random() < 0.7,
    },
    convs.max_pool_relu: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "channels": r.choice([1, 36, 64, 130]), "shift": r.choice([0, 1]),
        "with_bias": r.random() < 0.7, "sides": (r.randint(1, 20), r.randint(1, 40)),
    },
    convs.stem_conv: lambda r: {
        "dtype": r.choice([BF16, F16]), "channels": r.choice([1, 24, 64, 100]), "shift": r.choice([0, 1, 2]),
        "sides": (r.randint(1, 40), r.randint(1, 80)),
        "layout": r.choice([torch.channels_last, torch.contiguous_format]),
    },
    convs.first_channels: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "shift": r.choice([0, 1]),
        **dict(zip(("channels", "width"), r.choice([(1, 8), (36, 40), (819, 824), (16, 16)]), strict=True)),
    },
    convs.image_batch: lambda r: dict(
        zip(("dtype", "out_dtype"), r.choice([(_UINT8, BF16), (F32, F32), (_UINT8, F32)]), strict=True)
    ),
    detection.anchor_matching: lambda r: {
        "low_quality": r.random() < 0.5, "boxes_each": r.choice([1, 4, 33, 70]), "anchors": r.choice([100, 513, 1100]),
        "shift": r.choice([0, 1]),
    },
    detection.atss_matching: lambda r: {
        "per_cell": r.choice([1, 2, 9]), "top_k": r.choice([1, 4, 9, 30]), "boxes_each": r.choice([1, 3, 8]),
        "shapes": _shapes(r), "own": r.random() < 0.3, "shift": r.choice([0, 1]),
    },
    detection.task_aligned_matching: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "num_classes": r.choice([1, 7, 91]), "reg_max": r.choice([0, 0, 1, 16]),
        "top_k": r.choice([1, 5, 13, 100]), "boxes_each": r.choice([1, 3, 8]), "shapes": _shapes(r),
        "own": r.random() < 0.3, "shift": r.choice([0, 1]),
    },
    detection.candidate_selection: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "num_classes": r.choice([1, 2, 5, 17, 91]), "shapes": _shapes(r),
        "score_thresh": r.choice([0.0, 0.05, 0.5, 0.99, 1.0]), "topk": r.choice([0, 1, 7, 100, 10**10]),
        "ties": r.random() < 0.5, "shift": r.choice([0, 3]), "mixed": r.random() < 0.3,
    },
    detection.soft_nms: lambda r: {
        "method": r.choice(["linear", "gaussian"]), "by_class": r.random() < 0.5, "count": r.choice([3, 90, 530]),
        "limit": r.choice([1, 12]),
    },
    detection.box_voting: lambda r: {
        "by_class": r.random() < 0.5, "count": r.choice([3, 127, 300]), "shift": r.choice([0, 1]),
    },
    detection.greedy_nmm: lambda r: {
        "match_metric": r.choice(["IOU", "IOS"]), "by_class": r.random() < 0.5, "count": r.choice([3, 90, 300]),
        "limit": r.choice([1, 12, 300]), "threshold": r.choice([0.1, 0.3, 0.5, 1.0]),
    },
    detection.batched_nms: lambda r: {
        "by_class": r.random() < 0.5, "best_first": r.random() < 0.5, "count": r.choice([5, 40, 257, 600, 1030]),
        "iou_thresh": r.choice([-0.1, 0.0, 0.3, 0.5, 1.0]), "limit": r.choice([1, 20, 300]), "shift": r.choice([0, 1]),
    },
    detection.box_decode: lambda r: {
        "dtype": r.choice([BF16, F32]), "reg_max": r.choice([0, 0, 1, 16]), "shift": r.choice([0, 1]),
    },
    detection.take_kept: lambda r: {"shift": r.choice([0, 1])},
    detection.key_sort: lambda r: {"width": r.choice([1, 31, 300, 1100]), "counted": r.random() < 0.5},
    detection.postprocess: lambda r: {
        "dtype": r.choice([BF16, F32, F16]), "limit": r.choice([1, 9, 70]), "images": r.choice([1, 2]),
        "reg_max": r.choice([0, 0, 7]),
    },
}  # fmt: skip


def fuzz(seed: int, seconds: float) -> tuple[int, list[str]]:
    """How many random calls were made in the time, and those that failed: their arguments and what was wrong."""
    end, failures, count = time.monotonic() + seconds, [], 0
    while time.monotonic() < end:
        r = random.Random(f"{seed} {count}")
        case = r.choice([*_DRAWS])
        arguments = _DRAWS[case](r)
        perturb, count = r.choice([0, 1]), count + 1
        options: dict[str, Any] = {"seed": count, "shuffle": r.random() < 0.3, "together": r.choice([1, 3, 4])}
        outcome = run_case(partial(case, **arguments), seed_of_inputs=count, perturb=perturb, **options)
        wrong = [c.what for c in outcome.comparisons if c.error > _SLACK * c.limit]
        if outcome.fault or wrong:
            failures.append(f"{case.__name__} {arguments} {options} perturb={perturb}: {outcome.failures}")
    return count, failures


def main() -> None:
    torch.set_num_threads(1)
    count, failures = fuzz(int(sys.argv[1]), float(sys.argv[2]))
    print(*failures, sep="\n")
    print(f"{count} calls, {len(failures)} failed")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()

"""How far NMS and the postprocess are from a lower bound, by size and distribution: python -m benchmarks.predict.sweep.

A row is a case on one image: what is predicted for an H200 as a graph, and how many times the lower bound that is. The
bound is made of the least launches that an exact algorithm of separate kernels has (sort, suppress, write; before that,
read, pick and place for the postprocess), of the bytes of inputs and results at the bandwidth of a copy, and of the
comparisons of each kept box with all lower ones of its class, at 13 instructions a pair, with every issue slot full:

    bound = launches * (START + GRAPH_GAP) + max(bytes / bandwidth, 13 pairs / 32 / ISSUE)

With --cpu the same cases of NMS are timed beside torchvision's on this machine, in turns.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor

from benchmarks.predict import roofline
from benchmarks.predict.goals import postprocess_scene
from benchmarks.predict.predictions import by_variant, steps_of
from benchmarks.predict.roofline import Scene
from benchmarks.static.compiled import report
from retina_fast import ops
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import gpu_work_of

COUNTS, CLASSES = (1, 100, 1000, 10_000, 100_000), (1, 20, 91)
KINDS = ("none", "all", "chain")  # which overlap
SHARES = (0.001, 0.01, 0.1, 1.0)  # of the logits above the threshold
LOGITS_800 = 120_087 * 91  # of an image of 800x800


PAIR = 13  # instructions: six for the sides, three for the areas, two for the product, two to compare


def inputs(count: int, classes: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes (N, 4), distinct scores (N,) and classes (N,), of which none, all or each and the next overlap."""
    generator = torch.Generator().manual_seed(0)
    step = {"none": 20.0, "all": 0.0, "chain": 2.5}[kind]  # IoU 0.6 with the next, 1/3 with the one after
    x = torch.arange(count) // classes * step
    corner = torch.stack((x % 4000, x // 4000 * 20), dim=1)  # rows of 4000 pixels
    order = torch.randperm(count, generator=generator)
    return torch.cat((corner, corner + 10), dim=1), order / max(1, count), torch.arange(count) % classes


def kept_of(count: int, classes: int, kind: str) -> int:
    """Returns how many boxes of the fullest class are kept."""
    of_class = -(-count // classes)
    return {"none": of_class, "all": 1, "chain": max(1, of_class // 2)}[kind]


def bound(launches: int, size: float, pairs: float) -> float:
    """Returns the seconds of the lower bound."""
    work = max(size / roofline.BANDWIDTH, PAIR * pairs / 32 / roofline.ISSUE)
    return launches * (roofline.START + roofline.GRAPH_GAP) + work


def predicted() -> Iterator[str]:
    """Returns rows of markdown: predictions over bounds."""
    kinds = "batched_nms", "candidate_selection bf16 one", "postprocess bf16 one"
    cases = [name for name in kernel_calls.KERNEL_CALLS if name.startswith(kinds)]
    code = by_variant(report(["sm_90"], cases))

    def seconds(call: Callable[[], object], scene: Scene) -> float:
        return roofline.total(steps_of(gpu_work_of(call), code, scene), graph=True)

    yield "| boxes | classes | overlapping | predicted, us | bound, us | times |\n|---|---|---|---|---|---|"
    for count, classes, kind in itertools.product(COUNTS, CLASSES, KINDS):
        members, kept = -(-count // classes), kept_of(count, classes, kind)
        scene = Scene(candidates=count, members=members, kept=kept)
        call = functools.partial(kernel_calls.call_batched_nms, classes > 1, False, 1, count, count)
        least = bound(3, 36 * count, classes * members * kept / 2)
        taken = seconds(call, scene)
        yield f"| {count:,} | {classes} | {kind} | {1e6 * taken:.1f} | {1e6 * least:.1f} | {taken / least:.1f} |"
    yield "\n| above the threshold | predicted, us | bound, us | times |\n|---|---|---|---|"
    for share in SHARES:
        taken = seconds(functools.partial(kernel_calls.detect, torch.bfloat16, 1), postprocess_scene(1, share))
        least = bound(6, 2 * LOGITS_800, 0)
        yield f"| {share:.1%} | {1e6 * taken:.1f} | {1e6 * least:.1f} | {taken / least:.1f} |"


def on_cpu() -> Iterator[str]:
    """Returns rows of markdown: medians of turns, in milliseconds."""
    yield "| boxes | classes | overlapping | ours, ms | torchvision, ms | ratio |\n|---|---|---|---|---|---|"
    for count, classes, kind in itertools.product(COUNTS, CLASSES, KINDS):
        arguments = *inputs(count, classes, kind), 0.5
        times: dict[Callable[..., Tensor], list[float]] = {ops.batched_nms: [], torchvision.ops.batched_nms: []}
        for _ in range(5):
            for run, taken in times.items():
                start = time.perf_counter()
                run(*arguments)
                taken.append(1e3 * (time.perf_counter() - start))
            if sum(map(sum, times.values())) > 2e3:
                break
        ours, theirs = (statistics.median(taken) for taken in times.values())
        yield f"| {count:,} | {classes} | {kind} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="time NMS on this machine beside torchvision's")
    for line in on_cpu() if parser.parse_args().cpu else predicted():
        print(line, flush=True)


if __name__ == "__main__":
    main()

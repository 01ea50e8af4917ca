"""How far NMS and the postprocess are from a lower bound, by size and distribution: python -m benchmarks.predict.sweep.

A row is a case on one image: what is predicted for an H200 as a graph, and how many times the lower bound that is. The
bound is made of the least launches that an exact algorithm of separate kernels has (sort, suppress, write; before that,
read, pick and place for the postprocess), of the bytes of inputs and results at the bandwidth of a copy, and of the
comparisons of each kept box with all lower ones of its class, at 13 instructions a pair, with every issue slot full:

    bound = launches * (START + GRAPH_GAP) + max(bytes / bandwidth, 13 pairs / 32 / ISSUE)

One launch sorts up to 8192 boxes. More take five, the fewest of a radix sort of 32-bit scores by 8 bits at a time: one
counts, and four each read and write a score and a position (Adinets and Merrill 2022,
https://arxiv.org/abs/2206.01784).

With --cpu the same cases are timed beside torchvision's on this machine: one thread's process time, in turns. It takes
about three minutes.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor

from benchmarks.kernels import postprocess
from benchmarks.predict import hardware, roofline
from benchmarks.predict.goals import postprocess_scene
from benchmarks.predict.predictions import by_variant, steps_of
from benchmarks.predict.work import Scene
from benchmarks.static.compiled import report
from retina_fast import ops
from tests.instruments import kernel_calls
from tests.instruments.fake_gpu import gpu_work_of

COUNTS, CLASSES = (1, 100, 1000, 10_000, 100_000), (1, 20, 91)
KINDS = ("none", "all", "chain")  # which overlap
SHARES = (0.001, 0.01, 0.1, 1.0)  # of the logits above the threshold
LOGITS_800 = 120_087 * 91  # of an image of 800x800
SORTED = 8192  # boxes that one launch sorts
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


def rounds_of(members: int, kind: str, tile: int = 512) -> float:
    """Returns in how many rounds a tile of one class is settled, on average."""
    if kind != "chain":
        return 1 if kind == "none" else 2
    place = torch.randperm(members, generator=torch.Generator().manual_seed(0)) + 1  # in the chain, best first
    rank, gone, rounds = torch.full((members + 2,), members), torch.zeros(members + 2, dtype=torch.bool), []
    for first in range(0, members, tile):
        here = place[first : first + tile]
        rank[here] = torch.arange(first, first + len(here))
        better = [(side, (first <= rank[side]) & (rank[side] < rank[here])) for side in (here - 1, here + 1)]
        chosen, before, turns = ~gone[here], None, 0
        while before is None or not torch.equal(chosen, before):
            before, turns = chosen, turns + 1
            stays = torch.zeros_like(gone)
            stays[here[chosen]] = True
            chosen = ~gone[here] & ~torch.stack([stays[side] & is_better for side, is_better in better]).any(0)
        for side in (here - 1, here + 1):
            gone[side[chosen]] = True
        rounds.append(turns)
    return statistics.mean(rounds)


def bound(launches: int, size: float, pairs: float) -> float:
    """Returns the seconds of the lower bound."""
    work = max(size / hardware.BANDWIDTH, PAIR * pairs / 32 / hardware.ISSUE)
    return launches * (hardware.START + hardware.GRAPH_GAP) + work


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
        scene = Scene(candidates=count, members=members, kept=kept, rounds=rounds_of(members, kind))
        call = functools.partial(kernel_calls.call_batched_nms, classes > 1, False, 1, count, count)
        launches, size = (3, 36 * count) if count <= SORTED else (7, (36 + 64) * count)
        least = bound(launches, size, classes * members * kept / 2)
        taken = seconds(call, scene)
        yield f"| {count:,} | {classes} | {kind} | {1e6 * taken:.1f} | {1e6 * least:.1f} | {taken / least:.1f} |"
    yield "\n| above the threshold | predicted, us | bound, us | times |\n|---|---|---|---|"
    for share in SHARES:
        taken = seconds(functools.partial(kernel_calls.detect, torch.bfloat16, 1), postprocess_scene(1, share))
        least = bound(6, 2 * LOGITS_800, 0)
        yield f"| {share:.1%} | {1e6 * taken:.1f} | {1e6 * least:.1f} | {taken / least:.1f} |"


def _in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Returns the medians of the calls' milliseconds of this process, which take turns for a second."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(100):
        for call, taken in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            taken.append(1e3 * (time.process_time() - start))
        spent = sum(map(sum, times))
        if spent > 1e3:
            break
        if turn == 0:
            times = [[] for _ in calls]  # it has warmed up
    return [statistics.median(taken) for taken in times]


def on_cpu() -> Iterator[str]:
    """Returns rows of markdown: medians in milliseconds."""
    torch.set_num_threads(1)
    yield "| boxes | classes | overlapping | ours, ms | torchvision, ms | ratio |\n|---|---|---|---|---|---|"
    for count, classes, kind in itertools.product(COUNTS, CLASSES, KINDS):
        arguments = *inputs(count, classes, kind), 0.5
        calls = [functools.partial(each, *arguments) for each in (ops.batched_nms, torchvision.ops.batched_nms)]
        ours, theirs = _in_turns(calls)
        yield f"| {count:,} | {classes} | {kind} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |"
    yield "\n| postprocess, images | above the threshold | ours, ms | torchvision, ms | ratio |\n|---|---|---|---|---|"
    for batch, above in itertools.product((1, 8), SHARES):
        setting = dataclasses.replace(postprocess.CPU_SETTING, batch=batch, above=above)
        built = postprocess.build(setting, torch.device("cpu"))
        ours, theirs = _in_turns([built.ours, *built.baselines.values()])
        yield f"| {batch} | {above:.1%} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="time the cases on this machine beside torchvision's")
    for line in on_cpu() if parser.parse_args().cpu else predicted():
        print(line, flush=True)


if __name__ == "__main__":
    main()

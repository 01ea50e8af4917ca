"""Whether a search finds anything: its best permutation beside random ones of equal multiply-adds, trained alike.

    python -m benchmarks.models.search                   on the tree photographs, which `make demo` downloads
    python -m benchmarks.models.search --steps 300 --random 30 --seeds 3 --trials 2000

It goes on where it was stopped. A search without training proposes permutations within 2% of SpineNet-49's
multiply-adds. Its best, SpineNet-49 and random permutations of the same limits are then trained through `train` at a
quarter of the width, each with every seed, and scored by their training loss. Under the hypothesis that the best one is
another random one, each rank among the random ones is equally likely: that is the test. The rank correlation between
the entropy score and the trained one, over the same networks, says why it came out as it did.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from demo.trees import prepare
from retina_fast.backbones.specification import SPINENET, Block
from retina_fast.backbones.spinenet import SIZES
from retina_fast.data.augment import Flips
from retina_fast.data.coco import CocoDataset
from retina_fast.search.cost import cost
from retina_fast.search.proxy_check import compare, measure
from retina_fast.search.score import entropy_score
from retina_fast.search.space import PAPER
from retina_fast.search.study import Search, SearchSettings
from retina_fast.search.trained import Proxy

SIZE = SIZES["49"]
_TARGET = cost(SPINENET, SIZE).macs
_SLACK = 0.02


def random_ones(count: int, seed: int) -> list[tuple[Block, ...]]:
    """Different permutations drawn at random within the limits."""
    rng, found = random.Random(seed), dict[tuple[Block, ...], None]()
    while len(found) < count:
        blocks = PAPER.decode(PAPER.sample(rng))
        if abs(cost(blocks, SIZE).macs / _TARGET - 1) <= _SLACK:
            found[blocks] = None
    return list(found)


def searched(folder: Path, sampler: str, trials: int) -> Search:
    """A finished search by the entropy score."""
    least, most = (1 - _SLACK) * _TARGET, (1 + _SLACK) * _TARGET
    search = Search(SearchSettings(sampler=sampler, min_macs=least, max_macs=most), folder)
    search.run(trials)
    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/search-trees"))
    parser.add_argument("--trials", type=int, default=1000, help="of each search by the entropy score")
    parser.add_argument("--random", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--crop", type=int, default=128)
    chosen = parser.parse_args()
    console = Console()

    entropies = sorted(entropy_score(blocks, SIZE) for blocks in random_ones(1000, seed=1))
    published = entropy_score(SPINENET, SIZE)
    below = sum(value < published for value in entropies) / len(entropies)
    console.print(f"entropy: median of 1000 random ones {statistics.median(entropies):.0f}, best {entropies[-1]:.0f}")
    console.print(f"entropy: SpineNet-49 {published:.0f}, more than {below:.1%} of them")
    best = None
    for sampler in ("nsga2", "tpe", "random"):
        begun = time.process_time()
        found = searched(chosen.output / sampler, sampler, chosen.trials).best(1)[0]
        console.print(
            f"entropy: {sampler}, {chosen.trials} trials: {found.score:.0f} ({time.process_time() - begun:.0f} s)"
        )
        best = found if best is None or found.score > best.score else best
    assert best

    trees = prepare()
    data = CocoDataset(trees / "train.json", trees / "train")
    proxy = Proxy(data, steps=chosen.steps, parts=3, crop=chosen.crop, flips=Flips.ALL)
    networks = [best.blocks, SPINENET, *random_ones(chosen.random, seed=0)]
    runs = chosen.output / "runs"

    def trained(blocks: Sequence[Block], seed: int) -> float:
        return proxy.score(blocks, runs / f"{time.time_ns()}", seed)

    with Progress(console=console) as progress:
        task = progress.add_task("training runs", total=len(networks) * chosen.seeds)
        seeds = range(chosen.seeds)
        scores = measure(
            networks, trained, seeds, chosen.output / "scores.json", lambda done: progress.update(task, completed=done)
        )
    means = [statistics.fmean(values) for values in scores]
    others = sorted(means[2:])
    for name, value in (("the search's best", means[0]), ("SpineNet-49", means[1])):
        better = sum(other >= value for other in others)
        p = (1 + better) / (1 + len(others))
        console.print(f"trained: {name} {value:.4f}, beaten by {better} of {len(others)} random ones, p = {p:.3f}")
    console.print(f"trained: random ones {others[0]:.4f} to {others[-1]:.4f}, median {statistics.median(others):.4f}")
    check = compare([[entropy_score(blocks, SIZE)] for blocks in networks], scores)
    noise = compare(scores, scores)
    console.print(
        f"tau of entropy and training {check.tau.value:.2f} (95%: {check.tau.low:.2f} to {check.tau.high:.2f})"
    )
    console.print(f"trained scores: deviation between networks {noise.between:.4f}, between seeds {noise.within:.4f}")


if __name__ == "__main__":
    main()

"""Pictures of specifications and of what a search found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retina_fast.backbones.specification import LEVELS, Block, added_raw, stem_of

_COLORS = {1: "#E0E0E0", 2: "#A0A0A0", 3: "#E69F00", 4: "#009E73", 5: "#56B4E9", 6: "#CC79A7", 7: "#D55E00"}
_LEGEND = "blocks as they are built: round bottleneck, square residual, thick edge output; dashed: added as it is"


def draw(blocks: Sequence[Block], path: Path) -> None:
    """Write a picture of a checked specification; the ending of `path` says in which format.

    Blocks stand in the order they are built, at the height of their level; a link runs from each block to those it
    feeds.

    Example::

        >>> from retina_fast.backbones.specification import SPINENET
        >>> draw(SPINENET, Path("docs/spinenet.png"))  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    stem = stem_of(blocks)
    numbered = [*stem, *blocks]
    figure = Figure(figsize=(0.72 * len(numbered) + 1.4, 5.2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width, height = 0.56, 0.34

    def link(start: int, end: int, **style: Any) -> None:
        style = {"lw": 1.5, "zorder": 1, **style}
        rises = numbered[end].level >= numbered[start].level
        bend = 0 if end == start + 1 else -0.25 if rises else 0.25
        arrow = FancyArrowPatch(
            (start + width / 2, numbered[start].level),
            (end - width / 2, numbered[end].level),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            color=_COLORS[numbered[start].level],
            **style,
        )
        axes.add_patch(arrow)

    link(0, 1)
    for number, (block, raw) in enumerate(zip(blocks, added_raw(blocks), strict=True), start=len(stem)):
        for parent in block.parents:
            link(parent, number)
        for earlier in raw:
            link(earlier, number, linestyle=(0, (2, 2)), lw=2.2)
    for number, block in enumerate(numbered):
        corner = (number - width / 2, block.level - height / 2)
        rounding = "square,pad=0" if block.kind == "residual" else "round,pad=0,rounding_size=0.15"
        edge: dict[str, Any] = {"edgecolor": "#222222", "linewidth": 3.0 if block.is_output else 1.0}
        patch = FancyBboxPatch(corner, width, height, rounding, facecolor=_COLORS[block.level], zorder=2, **edge)
        axes.add_patch(patch)
        axes.text(number, block.level, str(number), ha="center", va="center", zorder=3)
        if block.is_output:
            axes.text(
                number, block.level + height, f"P{block.level}", ha="center", va="center", weight="bold", zorder=3
            )
    axes.set(xlim=(-0.7, len(numbered) - 0.3), ylim=(stem[0].level - 0.7, LEVELS[-1] + 0.8), xlabel=_LEGEND)
    axes.set_xticks([])
    levels = range(stem[0].level, LEVELS[-1] + 1)
    axes.set_yticks(levels, [f"level {level}\nstride {2**level}" for level in levels])
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_trials(
    trials: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], score: str, path: Path
) -> None:
    """Plot scores over multiply-adds.

    Args:
        trials: (multiply-adds, score) of every trial.
        front: those that no other beats in both, in the order of their multiply-adds.
        score: what is on the vertical axis.
        path: the picture.

    Example::

        >>> draw_trials([(8e10, 5.0), (9e10, 4.0)], [(8e10, 5.0)], "score", Path("front.png"))  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter([macs / 1e9 for macs, _ in trials], [value for _, value in trials], s=8, color="#A0A0A0", label="all")
    axes.plot([macs / 1e9 for macs, _ in front], [value for _, value in front], "o-", color="#D55E00", label="front")
    axes.set(xlabel="multiply-adds, G", ylabel=score)
    axes.legend()
    axes.grid(color="#DDDDDD")
    figure.savefig(path, dpi=110, bbox_inches="tight")

"""Draws a record of measurements: `python -m benchmarks.gpu.report [record]`, or `make report`.

It draws a record of `make gpu`, the newest in benchmarks/results/ by default, into a folder beside it: ratios, shares
of the device's limits, time over batch size, memory over ground truths, and the predictions of
benchmarks/predict/predictions.json beside what came of them. The folder's README.md gets the pictures and a row for
each goal, the project's README.md a row for each operation. The goals and the predictions are an H200's, so they are
left out of another device's report. Without a record it draws nothing.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import AMP, COMPILED, DEVICE, EAGER, FAMILIES, GOALS, Goal, goals_for

HERE = Path(__file__).parents[1]
README = HERE.parent / "README.md"
PREDICTIONS = HERE / "predict" / "predictions.json"
BEGIN, END = "<!-- results of make report -->", "<!-- end of results -->"
COLOURS = {"ours": "#1b6ca8", EAGER: "#c44e52", "torch eager": "#c44e52", AMP: "#dd8452", COMPILED: "#8172b3",
           "torch.compile": "#8172b3", "apex-style": "#937860"}  # fmt: skip

Rows = list[dict[str, Any]]


def newest() -> Path | None:
    """Returns the record measured last; those of small shapes do not count."""
    found = [path for path in (HERE / "results").glob("*.json") if not path.name.startswith("small-")]
    return max(found, key=lambda path: json.loads(path.read_text())["environment"]["date"], default=None)


def predictions(environment: dict[str, Any]) -> dict[str, float]:
    """Returns the milliseconds predicted for each goal as a CUDA graph, and nothing for another device than an H200.

    They are computed from the code of the record's Triton, or of the newest one that was looked at.
    """
    if DEVICE not in environment["device"]:
        return {}
    stored = json.loads(PREDICTIONS.read_text())
    goals = stored.get(environment["triton"], stored[newest_version(stored)])
    return {name: goal["graph_ms"] for name, goal in goals.items()}


def kept_predictions(environment: dict[str, Any], file: Path) -> dict[str, float]:
    """Returns what was predicted when a record was first drawn, which the file keeps: kernels and model go on."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(predictions(environment), indent=1) + "\n")
    kept: dict[str, float] = json.loads(file.read_text())
    return kept


def newest_version(versions: Iterable[str]) -> str:
    """Returns the newest of versions such as "3.9.0"."""
    return max(versions, key=lambda version: [int(number) for number in version.split(".")])


def caption(environment: dict[str, Any]) -> str:
    """Returns in a line what the figures depend on."""
    commit = (environment["commit"] or "unknown")[:7] + (", with uncommitted changes" if environment["dirty"] else "")
    names = ("torch", "triton", "torchvision")
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    small = ". Small shapes: a trial of the program, no claim" if environment["small"] else ""
    return f"{environment['device']}, driver {environment['driver']}, {versions}, commit {commit}{small}"


def by_goal(rows: Rows) -> dict[str, Rows]:
    """Returns the rows of each goal that has any, in the order of the goals."""
    found: dict[str, Rows] = {}
    for name in GOALS:
        if of_goal := [row for row in rows if row["goal"] == name]:
            found[name] = of_goal
    return found


def best_ms(row: dict[str, Any]) -> float:
    """Returns the milliseconds of ours, as the replay of a graph where the case was captured."""
    return row["raw_ms"].get("ours_graph", row["ours_ms"])


def table(record: dict[str, Any], predicted: dict[str, float]) -> str:
    """Returns the table of a record's own page: a row for each goal."""
    environment = record["environment"]
    measured = by_goal(record["records"])
    lines = [
        "| goal | | measured | times as fast as | of the limit | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for name, goal in goals_for(environment).items():
        rows = measured.get(name)
        if rows is None:
            failed = [entry for entry in record["failures"] if entry["goal"] == name]
            lines.append(f"| {name} | {goal.what} | {'failed' if failed else 'not measured'} | | | |")
            continue
        ratios = [
            f"{row['ratio']:.3g} {row['baseline']}{_wanted(row['ratio'], goal.ratios.get(row['baseline']))}"
            for row in rows
        ]
        ms, share = best_ms(rows[0]), rows[0]["ceiling_fraction"]
        speed = f"{ms:.3g} ms" + (f", {1e3 * goal.images / ms:.0f} images/s" if goal.images else "")
        limit = f" (goal {goal.ms:.3g} ms: {'met' if ms <= goal.ms else 'missed'})" if goal.ms else ""
        guess = f"{predicted[name]:.3g} ms" if name in predicted else ""
        cells = speed + limit, "; ".join(ratios), f"{share:.0%}{_wanted(100 * share, goal.share and 100 * goal.share)}"
        lines.append(f"| {name} | {goal.what} | {' | '.join(cells)} | {guess} |")
    ceilings = f"copy {environment['copy_gb_s']:.0f} GB/s, product {environment['bf16_tflop_s']:.0f} TFLOP/s"
    return "\n".join(
        [
            *lines,
            "",
            f"{caption(environment)}; {ceilings}; `make gpu`, `make report`. "
            "Measured is a CUDA graph's time where there is one, and ratios are of calls.",
        ]
    )


def _wanted(value: float, goal: float | None) -> str:
    return "" if goal is None else f" (goal {goal:.3g}: {'met' if value >= goal else 'missed'})"


def summary(record: dict[str, Any]) -> str:
    """Returns the table of the project's README: a row for each family of goals that was measured."""
    measured = by_goal(record["records"])
    lines = ["| times as fast as | torchvision | torchvision under autocast | torch.compile |", "|---|---|---|---|"]
    for family, what in FAMILIES.items():
        rows = [row for name in measured if name.partition("-")[0] == family for row in measured[name]]
        cells = [_span(row["ratio"] for row in rows if row["baseline"] in of) for of in ((EAGER,), (AMP,), _COMPILED)]
        if rows:
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{caption(record['environment'])}."])


_COMPILED = ("torch.compile", COMPILED)


def _span(values: Iterable[float]) -> str:
    """Returns "2" or "2 to 3", with two digits that count, or whole numbers."""
    shown = [f"{value:.2g}" if value < 99.5 else f"{value:.0f}" for value in sorted(values)]
    return " to ".join(dict.fromkeys([shown[0], shown[-1]])) if shown else ""


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two markers of a page.

    Raises:
        ValueError: if the page lacks one of them.
    """
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} lacks the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def draw(record: dict[str, Any], predicted: dict[str, float], folder: Path) -> list[Path]:
    """Draws the pictures, as far as the record has what they show, and returns their files."""
    from matplotlib.figure import Figure

    goals = goals_for(record["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (paint, width, height) in {
        "ratios": (lambda figure: _ratios(figure, record["records"], goals), 9, 0.27),
        "limits": (lambda figure: _limits(figure, record["records"], goals), 8, 0.15),
        "batches": (lambda figure: _over(figure, record["records"], _BATCH, "images in the batch", "ours_ms"), 8, 6),
        "memory": (lambda figure: _over(figure, record["records"], _OBJECTS, "objects an image", "peak_mb"), 8, 6),
        "predictions": (lambda figure: _predictions(figure, record["records"], predicted), 8, 0.15),
    }.items():
        rows = sum(row["goal"] is not None for row in record["records"])
        figure = Figure(figsize=(width, height if height > 1 else 2 + height * rows), layout="constrained")
        if paint(figure):
            figure.supxlabel(_wrapped(caption(record["environment"]), 15 * width), fontsize=7, color="#555555")
            figure.savefig(folder / f"{name}.png", dpi=110)
            drawn.append(folder / f"{name}.png")
    return drawn


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return textwrap.fill(text, width)


def _ratios(figure: Any, rows: Rows, goals: dict[str, Goal]) -> bool:
    """Draws a bar for each goal and baseline, and a line where it must reach."""
    axes = figure.add_subplot(xlabel="times as fast (logarithmic)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    places, labels, bars, place = [], [], {}, 0.0
    for name, of_goal in by_goal(rows).items():
        for row in of_goal:
            wanted = goals[name].ratios.get(row["baseline"])
            colour = COLOURS.get(row["baseline"], "#777777")
            bars[row["baseline"]] = axes.barh(place, row["ratio"], color=colour, height=0.8)
            _compared(axes, place, f"{row['ratio']:.3g}", wanted, f"{wanted:g}" if wanted else "")
            places.append(place)
            labels.append(f"{name}  {GOALS[name].what}" if row is of_goal[0] else "")
            place += 1
        place += 0.6
    axes.set_yticks(places, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="#999999", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    if any(goal.ratios for goal in goals.values()):
        (bars["goal"],) = axes.plot([], [], color="black", marker="|", ls="none", markersize=12, markeredgewidth=2)
    figure.legend([*bars.values()], [*bars], loc="outside upper center", ncols=4, fontsize=8)
    return bool(places)


def _compared(axes: Any, place: float, shown: str, wanted: float | None, shown_wanted: str) -> None:
    """Writes a value beside its row, and draws its goal as a line across the bar."""
    text = f"{shown} of {shown_wanted}" if shown_wanted else shown
    axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    if wanted:
        axes.plot([wanted] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)


def _limits(figure: Any, rows: Rows, goals: dict[str, Goal]) -> bool:
    """Draws a bar for each goal: the share of the device's limit that ours reaches."""
    found = by_goal(rows)
    axes = figure.add_subplot(xlabel="share of the device's limit: bandwidth of a copy, or rate of a product")
    for place, (name, of_goal) in enumerate(found.items()):
        share, wanted = of_goal[0]["ceiling_fraction"], goals[name].share
        axes.barh(place, share, color=COLOURS["ours"])
        _compared(axes, place, f"{share:.1%}", wanted, f"{wanted:.0%}" if wanted else "")
    axes.set_yticks(range(len(found)), [f"{name}  {GOALS[name].what}" for name in found], fontsize=8)
    axes.set(xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "25%", "50%", "75%", "100%"])
    axes.axvline(1, color="#999999", linewidth=1)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return bool(found)


_BATCH, _OBJECTS = re.compile(r", batch (\d+)"), re.compile(r", (\d+) ground truths an image")


def _over(figure: Any, rows: Rows, number: re.Pattern[str], label: str, key: str) -> bool:
    """Draws a panel for each family of cases that differ by one number and hold a goal: ours and each baseline."""
    from matplotlib.ticker import LogFormatter

    families: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    of_goals = set()
    for row in rows:
        if found := number.search(row["case"]):
            family = f"{row['case'].replace(found[0], '')}, {row['dtype']}"
            families[family]["ours"].append((int(found[1]), row[key]))
            families[family][row["baseline"]].append((int(found[1]), row[f"baseline_{key.removeprefix('ours_')}"]))
            of_goals |= {family} if row["goal"] else set()
    several = {name: families[name] for name in families if name in of_goals and len(set(families[name]["ours"])) > 1}
    columns = min(3, len(several)) or 1
    figure.set_size_inches(3.7 * columns, 1 + 2.7 * -(-len(several) // columns))
    drawn = {}
    for i, (name, lines) in enumerate(several.items()):
        axes = figure.add_subplot(-(-len(several) // columns), columns, i + 1)
        axes.set_title(_wrapped(name, 42), fontsize=8)
        if not any(y > 0 for points in lines.values() for _, y in points):
            axes.text(0.5, 0.5, "not counted on this device", ha="center", transform=axes.transAxes, color="#777777")
            axes.set(xticks=[], yticks=[])
            continue
        for version, points in lines.items():
            xs, ys = zip(*sorted(set(points)), strict=True)
            (drawn[version],) = axes.plot(xs, ys, "o-", color=COLOURS.get(version, "#777777"), markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for x, _ in lines["ours"]}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("MB at the peak" if key == "peak_mb" else "ms", fontsize=8)
        axes.tick_params(which="both", labelsize=8)
    if drawn:
        figure.legend([*drawn.values()], [*drawn], loc="outside upper center", ncols=3, fontsize=8)
    return bool(several)


def _predictions(figure: Any, rows: Rows, predicted: dict[str, float]) -> bool:
    """Draws for each goal what was predicted and what was measured."""
    found = by_goal(rows)
    points = {name: (predicted[name], best_ms(found[name][0])) for name in found if name in predicted}
    axes = figure.add_subplot(xlabel="ms (logarithmic)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    for place, (guess, measured) in enumerate(points.values()):
        axes.plot([guess, measured], [place, place], color="#bbbbbb", zorder=1)
        axes.plot(guess, place, "o", color="white", markeredgecolor="black", label="" if place else "predicted, H200")
        axes.plot(measured, place, "o", color=COLOURS["ours"], label="" if place else "measured")
        _compared(axes, place, f"{measured:.3g}", None, f"{guess:.3g}")
    axes.set_yticks(range(len(points)), [f"{name}  {GOALS[name].what}" for name in points], fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return bool(points)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="a file of benchmarks/results/; the newest by default")
    parser.add_argument("--pictures", type=Path, help="the folder of the pictures; by default beside the record")
    parser.add_argument("--readme", type=Path, default=README, help="the file whose table is written")
    options = parser.parse_args(arguments)
    path = options.record or newest()
    if path is None or not path.exists():
        print(f"There is no record {path or 'in benchmarks/results/'} to draw from: `make gpu` measures one on a GPU.")
        return 2
    record = json.loads(path.read_text())
    environment = record["environment"]
    if options.readme == README and (environment["small"] or environment["dirty"] or not record["records"]):
        print(f"{path} is no record for README.md: small shapes, uncommitted changes, or nothing measured.")
        return 2
    folder = options.pictures or path.with_suffix("")
    predicted = kept_predictions(environment, folder / "predicted.json")
    pictures = draw(record, predicted, folder)
    page = folder / "README.md"
    shown = "".join(f"![{picture.stem}]({picture.name})\n\n" for picture in pictures)
    page.write_text(f"# {environment['device']}\n\n{table(record, predicted)}\n\n{shown}".rstrip() + "\n")
    here = os.path.relpath(folder, options.readme.parent)
    picture = f"![Times as fast, by goal and baseline]({here}/ratios.png)\n\n"
    lead = picture if folder / "ratios.png" in pictures else ""
    link = f"[Every goal beside its figure]({here}/README.md)."
    write_between(options.readme, BEGIN, END, f"{lead}{summary(record)} {link}")
    print("\n".join(str(path) for path in (*pictures, page, options.readme)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Predicts what each goal will take on an H200: `python -m benchmarks.predict`.

It writes predictions.json and, for the newest Triton in it, the table of NOTES.md: for each goal of one GPU, every
launch with its time and what bounds it (`benchmarks.predict.roofline`). The launches are recorded on fake tensors
(`benchmarks.predict.goals`), and their machine code for sm_90 comes from the Triton at hand. `make report` draws the
predictions beside what was measured.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import PREDICTIONS, newest_version, write_between
from benchmarks.models import training_step
from benchmarks.predict import hardware, roofline
from benchmarks.predict.cost import Training
from benchmarks.predict.goals import CALLS, inference_work, postprocess_scene, training_forward_work
from benchmarks.predict.roofline import Step
from benchmarks.predict.work import Scene
from benchmarks.static.compiled import Row, report
from tests.instruments.fake_gpu import Launch, TorchOp, gpu_work_of, launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS

NOTES = Path(__file__).with_name("NOTES.md")
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"

Prediction = dict[str, Any]  # ms, graph_ms, and launches: rows of name, bound, times, microseconds


def by_variant(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Returns the sm_90 code of every launch of KERNEL_CALLS by its variant."""
    of_case: dict[str, list[Row]] = {}
    for row in rows:
        of_case.setdefault(row.case, []).append(row)
    found: dict[tuple[str, ...], Row] = {}
    for case, case_rows in of_case.items():
        variants = {launch.variant: None for launch in launches_of(KERNEL_CALLS[case].run)}
        found.update(zip(variants, case_rows, strict=True))
    return found


def predictions(rows: dict[tuple[str, ...], Row]) -> dict[str, Prediction]:
    """Returns the prediction of each goal from the code of its kernels.

    `ms` is the time while the host keeps the GPU busy, `graph_ms` that of a CUDA graph. The training step is the
    forward pass of the trunk and heads as many times over as its arithmetic, the loss path, and an optimizer that reads
    and writes weights, gradients and momenta.
    """
    steps = {name: steps_of(gpu_work_of(call), rows, scene()) for name, (call, scene) in CALLS.items()}
    steps["E1"] = steps_of(inference_work(1), rows, postprocess_scene(1))
    steps["E2"] = steps_of(inference_work(32), rows, postprocess_scene(32))
    run = Training(width=800)
    forward = steps_of(training_forward_work(16), rows, Scene())
    times = run.step_gflop / run.forward_gflop
    weights = sum(p.numel() for p in training_step.network(training_step.BASE).parameters() if p.requires_grad)
    steps["E3"] = [
        *[Step(step.name, times * step.seconds, step.bound) for step in forward],
        *steps["K2"],
        Step("optimizer", hardware.START + 5 * 4 * weights / hardware.BANDWIDTH, "memory"),
    ]
    return {name: _summary(of_goal) for name, of_goal in steps.items()}


def steps_of(work: Iterable[Launch | TorchOp], rows: dict[tuple[str, ...], Row], scene: Scene) -> list[Step]:
    """Returns the time of each launch and each operation of torch."""
    return [
        roofline.torch_step(step) if isinstance(step, TorchOp) else roofline.kernel_step(step, _row(step, rows), scene)
        for step in work
    ]


def _row(launch: Launch, rows: dict[tuple[str, ...], Row]) -> Row:
    """Returns the code of the launch's own variant, or, if no case has it, of the same kernel and constants, or of the
    same kernel."""
    own = launch.variant
    of_kernel = {variant: row for variant, row in rows.items() if variant[0] == own[0]}
    alike = [row for variant, row in of_kernel.items() if variant[-1] == own[-1]]
    return rows.get(own) or [*alike, *of_kernel.values()][0]


def _summary(steps: list[Step]) -> Prediction:
    launched: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        launched.setdefault((step.name, step.bound), []).append(step.seconds)
    return {
        "ms": _rounded(1e3 * roofline.total(steps, graph=False)),
        "graph_ms": _rounded(1e3 * roofline.total(steps, graph=True)),
        "launches": [
            [name, bound, len(seconds), _rounded(1e6 * sum(seconds))] for (name, bound), seconds in launched.items()
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def table(predicted: dict[str, Prediction]) -> Iterator[str]:
    """Returns the predictions as rows of markdown."""
    yield "| goal | predicted, ms | as a graph | launches | most of it |"
    yield "|---|---|---|---|---|"
    for name, goal in predicted.items():
        launches = sorted(goal["launches"], key=lambda launch: -launch[3])
        whole = sum(us for _, _, _, us in launches)
        most = ", ".join(f"{launched} {us / whole:.0%} ({bound})" for launched, bound, _, us in launches[:3])
        yield f"| {name} | {goal['ms']} | {goal['graph_ms']} | {sum(launch[2] for launch in launches)} | {most} |"


def as_json(stored: dict[str, dict[str, Prediction]]) -> str:
    """Returns the predictions of each version of Triton as JSON, with a goal on each line."""
    versions = [
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(goal)}" for name, goal in goals.items())
        + "\n }"
        for version, goals in stored.items()
    ]
    return "{\n" + ",\n".join(versions) + "\n}\n"


def main() -> None:
    """Runs the command."""
    import triton

    goals = predictions(by_variant(report(["sm_90"])))
    stored = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {}
    stored[triton.__version__] = goals
    PREDICTIONS.write_text(as_json(stored))
    write_between(NOTES, BEGIN, END, "\n" + "\n".join(table(stored[newest_version(stored)])) + "\n")
    print("\n".join(table(goals)))


if __name__ == "__main__":
    main()

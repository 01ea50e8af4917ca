"""`make report` draws a record, and writes its page and the table of README.md."""

import json
import re

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.goals import AMP, COMPILED, EAGER, GOALS

README = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe rest.\n"


@pytest.fixture
def record(tmp_path):
    """A record of an H200 with all cases, as if of small shapes, and with two goals that were not measured."""
    stored = json.loads((report.HERE / "results" / "nvidia-h200-before-epilogue.json").read_text())
    stored["environment"]["small"] = True
    stored["records"] = [row for row in stored["records"] if row["goal"] not in ("K6", "E4")]
    (tmp_path / "small-h200.json").write_text(json.dumps(stored))
    return tmp_path / "small-h200.json"


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "README.md"


@pytest.mark.slow
def test_pictures_and_a_table(record, readme, capsys):
    pytest.importorskip("matplotlib")
    folder = readme.parent / "pictures"
    assert report.main([str(record), "--pictures", str(folder), "--readme", str(readme)]) == 0
    names = ["ratios", "limits", "batches", "memory", "predictions"]
    written = [*(f"{folder}/{name}.png" for name in names), f"{folder}/README.md", str(readme)]
    assert written == capsys.readouterr().out.split()
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    short = readme.read_text()
    assert short.startswith("# Title")
    assert short.endswith(f"{report.END}\n\nThe rest.\n")
    assert "old" not in short
    assert "(pictures/ratios.png)" in short
    assert "(pictures/README.md)" in short
    assert "| NMS |" in short
    text = (folder / "README.md").read_text()
    stored = json.loads(record.read_text())
    assert stored["environment"]["commit"][:7] in text
    assert "Small shapes: a trial of the program, no claim" in text
    for name in GOALS:
        (line,) = re.findall(rf"^\| {name} \|.*", text, re.M)
        rows = [row for row in stored["records"] if row["goal"] == name]
        assert ("not measured" in line) == (not rows)
        for row in rows:
            assert f"{row['ratio']:.3g} {row['baseline']}" in line


def test_a_share_a_rate_and_a_failure(tmp_path):
    row = {
        "goal": "E2", "baseline": "torchvision eager AMP", "ratio": 6.0, "ours_ms": 16.0, "ceiling_fraction": 0.5,
        "raw_ms": {},
    }  # fmt: skip
    captured = row | {"goal": "K1-bf16", "baseline": "torch.compile", "ratio": 2.0, "raw_ms": {"ours_graph": 0.08}}
    here = {"device": "H200", "driver": "1", "torch": "2", "triton": "3", "torchvision": "0", "commit": "a" * 40,
            "dirty": False, "small": False, "copy_gb_s": 4300.0, "bf16_tflop_s": 790.0}  # fmt: skip
    failures = [{"goal": "K2", "case": "", "dtype": "", "baseline": None, "error": ""}]
    predicted = {"K1-bf16": 0.088}
    text = report.table({"environment": here, "records": [row, captured], "failures": failures}, predicted)
    assert "| 16 ms, 2000 images/s (goal 20 ms: met) | 6 torchvision eager AMP (goal 5: met) | 50% | " in text
    assert "| 0.08 ms | 2 torch.compile (goal 2.5: missed) | 50% (goal 70: missed) | 0.088 ms |" in text
    assert "| K2 | matching and losses | failed |" in text
    other = report.table(
        {"environment": here | {"device": "NVIDIA H100"}, "records": [row, captured], "failures": []}, {}
    )
    assert "| 16 ms, 2000 images/s | 6 torchvision eager AMP | 50% | " in other
    assert "goal " not in other.replace("| goal |", "")  # the goals are an H200's
    assert (
        "H200, driver 1, torch 2, triton 3, torchvision 0, commit aaaaaaa; copy 4300 GB/s, product 790 TFLOP/s" in text
    )


def test_the_short_table_has_a_row_for_each_family():
    def row(goal, baseline, ratio, **more):
        return {"goal": goal, "baseline": baseline, "ratio": ratio, "ours_ms": 1.0, "ceiling_fraction": 0.8,
                "raw_ms": {}} | more  # fmt: skip

    rows = [
        row("K1-fp32", EAGER, 36.3), row("K1-fp32", "torch.compile", 3.59), row("K1-fp32", "apex-style", 2.02),
        row("K1-bf16", EAGER, 12.0), row("E1", EAGER, 7.16), row("E1", AMP, 8.0), row("E1", COMPILED, 2.0),
    ]  # fmt: skip
    here = {"device": "H200", "driver": "1", "torch": "2", "triton": "3", "torchvision": "0", "commit": "a" * 40,
            "dirty": False, "small": False}  # fmt: skip
    lines = report.summary({"environment": here, "records": rows}).splitlines()
    assert lines[2] == "| focal loss | 12 to 36 |  | 3.6 |"
    assert lines[3] == "| inference, batch 1 | 7.2 | 8 | 2 |"
    assert len(lines) == 6


def test_predictions_are_of_the_records_triton_and_of_an_h200():
    stored = json.loads(report.PREDICTIONS.read_text())
    for triton, of in (("3.6.0", "3.6.0"), ("99.0.0", "3.9.0")):
        found = report.predictions({"device": "NVIDIA H200", "triton": triton})
        assert found == {name: goal["graph_ms"] for name, goal in stored[of].items()}
    assert report.predictions({"device": "NVIDIA H100 80GB HBM3", "triton": "3.6.0"}) == {}


def test_predictions_are_those_of_the_first_report(tmp_path):
    here = {"device": "NVIDIA H200", "triton": "3.6.0"}
    file = tmp_path / "gpu" / "predicted.json"
    assert report.kept_predictions(here, file) == report.predictions(here)
    file.write_text(json.dumps({"K2": 1.5}))
    assert report.kept_predictions(here, file) == {"K2": 1.5}


def test_without_a_record_it_says_so_and_draws_nothing(monkeypatch, tmp_path, readme, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small-cpu.json").write_text("{}")
    assert report.main(["--readme", str(readme)]) == 2
    assert "There is no record in benchmarks/results/ to draw from" in capsys.readouterr().out
    assert report.main([str(tmp_path / "none.json"), "--readme", str(readme)]) == 2
    assert readme.read_text() == README
    assert not list(tmp_path.rglob("*.png"))


def test_the_newest_record_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    for name, date in (("a", "2026-01-02"), ("b", "2026-01-03"), ("small-cpu", "2026-01-04")):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"environment": {"date": date}}))
    assert report.newest() == tmp_path / "results" / "b.json"


def test_small_shapes_never_reach_the_readme(record, capsys):
    before = report.README.read_text()
    assert report.main([str(record)]) == 2
    assert "is no record for README.md" in capsys.readouterr().out
    assert report.README.read_text() == before


def test_the_readme_has_a_place_for_the_table(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text())
    report.write_between(copy, report.BEGIN, report.END, "| measured |")
    assert copy.read_text().count("| measured |") == 1
    copy.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write_between(copy, report.BEGIN, report.END, "")

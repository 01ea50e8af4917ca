"""Studies: what they find, how they are gone on with, and workers that are killed and added."""

import csv
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from retina_fast import checkpoint, cli
from retina_fast.backbones.specification import MOBILE_KINDS, checked
from retina_fast.backbones.spinenet import Size
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.search import study as module
from retina_fast.search.cost import cost
from retina_fast.search.score import entropy_score
from retina_fast.search.space import PAPER
from retina_fast.search.study import Search, SearchSettings
from retina_fast.search.trained import Proxy
from retina_fast.search.workers import PROBLEM
from retina_fast.train import Stopped
from retina_fast.train.model_file import read_model_file, write_model_file

optuna = pytest.importorskip("optuna")
pytest.importorskip("lightning")

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take a second each; one test looks at them."""
    monkeypatch.setattr(module, "draw", lambda blocks, path: None)
    monkeypatch.setattr(module, "draw_trials", lambda *arguments: None)


def points(search: Search) -> list[dict[str, Any]]:
    return [trial.params for trial in search.study.get_trials(deepcopy=False)]


def test_files_of_others_and_studies_that_cannot_be_opened(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best-3.json").write_text("my figures")
    with pytest.raises(UserError, match=r"best-3\.json: is of no search, which would replace it"):
        Search(SearchSettings(), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["best-3.json"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.log").write_text("no journal\n")
    with pytest.raises(UserError, match=r"study\.log: cannot be opened as a search's study \("):
        Search(SearchSettings(), tmp_path / "damaged")
    with pytest.raises(UserError, match=r"foo://x: cannot be opened as a search's study \("):
        Search(SearchSettings(), tmp_path / "database", storage="foo://x")
    result = CliRunner().invoke(cli.app, ["search", "--metric", "AP50", "--output", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert "--metric AP50 is of a validation" in " ".join(result.stderr.split())


def test_a_search_without_training(tmp_path):
    settings = SearchSettings(max_macs=86e9, min_macs=80e9, max_parameters=30e6)
    search = Search(settings, tmp_path)
    seen: list[int] = []
    search.run(40, seen.append)
    assert (seen[0], seen[-1]) == (0, 40)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert len(rows) == 40
    within = []
    for row in rows:
        blocks = checked(json.loads(row["specification"]))
        assert cost(blocks, settings.size) == (int(row["parameters"]), float(row["macs"]))
        assert float(row["score"]) == pytest.approx(entropy_score(blocks, settings.size))
        if 80e9 <= float(row["macs"]) <= 86e9 and int(row["parameters"]) <= 30e6:
            within.append((float(row["score"]), float(row["macs"])))
    assert 0 < len(within) < 40
    assert len(search.found()) == len(within)
    assert search.best(1)[0].score == max(within)[0]
    front = search.front()
    for trial in front:
        assert not any(score > trial.score and macs <= trial.macs for score, macs in within)
    assert front[-1].score == max(within)[0]
    name, arguments = read_model_file(tmp_path / "best-1.json")
    assert (name, checked(arguments["specification"])) == ("retinanet_spinenet49", search.best(1)[0].blocks)


@pytest.mark.slow
def test_pictures(tmp_path, monkeypatch):
    monkeypatch.undo()
    search = Search(SearchSettings(sampler="random"), tmp_path)
    monkeypatch.setattr(module, "BEST", 1)
    search.run(2)
    assert {"front.png", "best-1.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_search_is_gone_on_with_by_the_same_settings_alone(tmp_path):
    Search(SearchSettings(sampler="random"), tmp_path).run(3)
    again = Search(SearchSettings(sampler="random"), tmp_path)
    again.run(5)
    assert len({json.dumps(point) for point in points(again)}) == 5  # and it draws others than at first
    with pytest.raises(UserError, match="has sampler random, not tpe: give it the same, or another --output"):
        Search(SearchSettings(sampler="tpe"), tmp_path)
    other = Search(SearchSettings(sampler="random"), tmp_path / "other", start_from=tmp_path)
    other.run(5)
    assert [trial.blocks for trial in other.best()] == [trial.blocks for trial in again.best()]
    with pytest.raises(UserError, match=r"best-1.json: is no point of the space public \(the space has 11"):
        Search(SearchSettings("public"), tmp_path / "public", start_from=tmp_path)
    with pytest.raises(UserError, match=r"holds no best-1.json of a search"):
        Search(SearchSettings(), tmp_path / "none", start_from=tmp_path / "public")
    first = Search(SearchSettings(sampler="random"), tmp_path / "first")
    first.run(3)
    assert points(first) == points(again)[:3]  # a seed draws the same points


def test_a_journal_that_ends_in_half_a_line(tmp_path):
    Search(SearchSettings(sampler="random"), tmp_path).run(2)
    with (tmp_path / "study.log").open("a") as file:
        file.write('{"op_code":')
    search = Search(SearchSettings(sampler="random"), tmp_path)
    search.run(3)
    assert len(search.found()) == 3


def test_other_samplers_and_the_mobile_space(tmp_path):
    search = Search(SearchSettings("mobile", "retinanet_spinenet49_mobile", "tpe"), tmp_path)
    search.run(12)
    for trial in search.best():
        assert checked(trial.blocks, MOBILE_KINDS)
    for bad in ({"space": "all"}, {"sampler": "cma"}, {"model": "retinanet_spinenet49_mobile"}):
        ((name, value),) = bad.items()
        with pytest.raises(UserError, match=f"{name} must be one of .*, got '{value}'"):
            SearchSettings(**bad)  # pyrefly: ignore[bad-argument-type]


# Training

LINEAR = checked(
    [(3, "residual", (0, 1), True), *((level, "residual", (level - 3, level - 2), True) for level in range(4, 8))]
)


class Scripted(Proxy):
    """Scores that are given, in place of training."""

    def score(self, blocks: Any, output: Path, seed: int = 0, report: Any = None) -> float:
        value = cost(blocks, self.size).macs
        if self.metric == "fails":
            raise UserError("the loss is not finite")
        for step in range(1, self.parts + 1):
            report(step, value)
        return value


@pytest.fixture
def data(shapes) -> CocoDataset:
    return CocoDataset(*shapes)


def test_hyperband_and_limits_with_training(tmp_path, data):
    settings = SearchSettings(sampler="random", max_macs=86e9)
    search = Search(settings, tmp_path, Scripted(data, parts=9))
    search.run(30)
    trials = search.study.get_trials()
    over = [trial for trial in trials if trial.user_attrs["macs"] > 86e9]
    assert over
    assert all(trial.state.name == "PRUNED" and not trial.intermediate_values for trial in over)
    ended = [trial for trial in trials if trial.state.name == "PRUNED" and trial.intermediate_values]
    assert ended
    assert {trial.number for trial in trials if trial.state.name == "COMPLETE"} == {t.number for t in search.found()}
    assert search.best(1)[0].macs == max(trial.macs for trial in search.found())


def test_a_point_that_cannot_be_trained_counts_and_says_why(tmp_path, data):
    search = Search(SearchSettings(sampler="random"), tmp_path, Scripted(data, metric="fails"))
    search.run(2)
    assert [trial.user_attrs[PROBLEM] for trial in search.study.get_trials()] == ["the loss is not finite"] * 2
    with pytest.raises(UserError, match="has steps 300, not 5: give it the same"):
        Search(SearchSettings(sampler="random"), tmp_path, Scripted(data, metric="fails", steps=5))
    with pytest.raises(UserError, match="has batch_size 4, not None: give it the same"):
        Search(SearchSettings(sampler="random"), tmp_path)  # without training


def test_a_score_by_training(tmp_path, data):
    size = Size(0.1, 0.25, 1, 8, 8, 1, 128, 3)
    proxy = Proxy(data, None, size, steps=4, parts=2, batch_size=2, crop=64)
    told: list[tuple[int, float]] = []
    value = proxy.score(LINEAR, tmp_path / "run", report=lambda step, score: told.append((step, score)))
    assert [step for step, _ in told] == [1, 2]
    assert told[-1][1] == value < 0
    content = checkpoint.load(tmp_path / "run" / "model.pt")
    assert checked(content.kwargs["specification"]) == LINEAR
    (*_, row) = [row for row in csv.DictReader((tmp_path / "run" / "log.csv").open()) if row["classification"]]
    assert float(row["classification"]) + float(row["bbox_regression"]) == pytest.approx(-value, rel=1e-3)


@pytest.mark.slow
def test_a_score_by_validation(tmp_path, data):
    size = Size(0.1, 0.25, 1, 8, 8, 1, 128, 3)
    proxy = Proxy(data, data, size, steps=4, parts=2, batch_size=2, crop=64, metric="AP50")
    score = proxy.score(LINEAR, tmp_path / "ap")
    assert score == checkpoint.load(tmp_path / "ap" / "model.pt").metrics["AP50"]
    with pytest.raises(UserError, match="metric must be one of loss, got AP; all but loss need validation data"):
        replace(proxy, validation=None, metric="AP").score(LINEAR, tmp_path / "bad")

    class Enough(Exception):
        pass

    def stop(step: int, score: float) -> None:
        raise Enough

    with pytest.raises(Enough):
        proxy.score(LINEAR, tmp_path / "ended", report=stop)


# The commands


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_and_training_what_it_found(tmp_path, shapes, monkeypatch):
    result = invoke("search", "--output", tmp_path / "search", "--trials", 4, "--sampler", "random")
    assert result.exit_code == 0, result.output
    assert "Best: score" in result.output
    seen: list[Any] = []

    def run(settings: Any, *_: Any, **__: Any) -> Path:
        seen.append(settings)
        return tmp_path

    monkeypatch.setattr("retina_fast.train.train", run)
    data = ("--json", shapes[0], "--images", shapes[1])
    result = invoke("train", *data, "--model", tmp_path / "search" / "best-1.json", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert seen[0].model == "retinanet_spinenet49"
    assert PAPER.encode(seen[0].arguments["specification"])
    alone = ("--val-json", shapes[0], "--output", tmp_path / "alone")
    assert "--val-json belongs to --json: give both" in invoke("search", *alone).output.replace("\n", " ")
    wider = ("--fusion", "none", "--fusion", "0.5:1", "--alpha", 0.25, "--alpha", 0.5)
    result = invoke("search", "--output", tmp_path / "wider", "--trials", 2, *wider)
    assert result.exit_code == 0, result.output
    blocks = checked(read_model_file(tmp_path / "wider" / "best-1.json")[1]["specification"])
    assert {block.fusion for block in blocks} == {None, (0.5, 1.0)}
    assert {alpha for block in blocks for alpha in block.alphas or ()} == {0.25, 0.5}
    assert "must be none, learned or two" in invoke("search", "--fusion", "0:1").output.replace("\n", " ")
    mobile = invoke("search", "--space", "mobile", "--alpha", 0.5)
    assert "the links of the mobile family have no alphas" in mobile.output.replace("\n", " ")
    result = invoke("search", "--output", tmp_path / "none", "--trials", 2, "--max-gmacs", 1)
    assert "of 2 trials none ended with a score within the limits" in result.output.replace("\n", " ")


def test_files_of_networks_that_are_refused(tmp_path):
    path = tmp_path / "network.json"
    with pytest.raises(UserError, match="no such file of a network"):
        read_model_file(path)
    for content, problem in {
        "{": "is no JSON",
        "[]": "must hold",
        '{"model": "retinanet_spinenet49"}': "must hold",
        '{"model": 3, "arguments": {}}': "must hold",
        '{"model": "spinenet", "arguments": {}}': "there is no model 'spinenet'",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=problem):
            read_model_file(path)
    write_model_file(path, "retinanet_spinenet49", {"activation": "silu"})
    assert read_model_file(path) == ("retinanet_spinenet49", {"activation": "silu"})


def test_a_stopped_search_says_how_to_go_on(tmp_path, shapes, monkeypatch):
    def stopped(*_: Any) -> float:
        raise Stopped

    data = ("--json", shapes[0], "--images", shapes[1], "--output", tmp_path / "search", "--trials", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Proxy, "score", stopped)
        result = invoke("search", *data)
    assert result.exit_code == 130
    assert "Stopped. The same command goes on" in result.output
    monkeypatch.setattr(Proxy, "score", lambda *_: 1.0)
    assert invoke("search", *data).exit_code == 0
    rows = list(csv.DictReader((tmp_path / "search" / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["FAIL", "COMPLETE"]
    assert rows[0]["specification"] == rows[1]["specification"]

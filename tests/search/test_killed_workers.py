"""Workers of a study that are killed and added, on a journal and on a database."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from retina_fast.search import storage
from retina_fast.search import study as module
from retina_fast.search.score import entropy_score
from retina_fast.search.study import Search, SearchSettings
from retina_fast.search.workers import RETRY_OF, Locked

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


def worker(folder: Path, count: int, seconds: float, url: str | None) -> None:
    """A process of a search whose trials take so long."""

    def slowly(*arguments: Any) -> float:
        time.sleep(seconds)
        return entropy_score(*arguments)

    setattr(module, "entropy_score", slowly)  # noqa: B010
    Search(SearchSettings(sampler="random"), folder, storage=url).run(count)


def start(folder: Path, count: int, seconds: float = 0.05, url: str | None = None) -> Any:
    process = FORK.Process(target=worker, args=(folder, count, seconds, url))
    process.start()
    return process


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 30), *(pytest.param(x, 60, marks=pytest.mark.slow) for x in (1, 2, 3, 4))]
)
def test_four_workers_two_killed_and_one_added(tmp_path, seed, count):
    rng = random.Random(seed)
    processes = [start(tmp_path, count, 0.15) for _ in range(4)]  # so long that no worker ends before both kills
    for victim in processes[:2]:
        time.sleep(rng.uniform(0.1, 0.3))
        os.kill(victim.pid, signal.SIGKILL)
    processes.append(start(tmp_path, count, 0.15))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-9, -9, 0, 0, 0]
    search = Search(SearchSettings(sampler="random"), tmp_path)
    trials = search.study.get_trials(deepcopy=False)
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == count
    assert states.keys() <= {"COMPLETE", "FAIL"}
    retries = {trial.user_attrs[RETRY_OF]: trial for trial in trials if RETRY_OF in trial.user_attrs}
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert sorted(retries) == [trial.number for trial in failed]
    assert len(failed) <= 2
    for trial in failed:  # what had been drawn of the point is tried again
        assert retries[trial.number].params.items() >= trial.params.items()
    finished = [json.dumps(trial.params) for trial in trials if trial.state.name == "COMPLETE"]
    assert len({*finished}) == count


def test_a_worker_that_dies_in_each_of_its_steps(tmp_path):
    """After asking; before queueing for another, and after it; while drawing; while scoring."""
    study = Search(SearchSettings(sampler="random"), tmp_path).study

    def killed_at(owner: Any, name: str) -> None:
        def child() -> None:
            setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            Search(SearchSettings(sampler="random"), tmp_path).run(3)

        process = FORK.Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == -9

    killed_at(Search, "_begin")
    killed_at(optuna.Study, "enqueue_trial")
    killed_at(optuna.Study, "tell")
    killed_at(module, "cost")
    killed_at(module, "entropy_score")
    search = Search(SearchSettings(sampler="random"), tmp_path)
    search.run(3)
    assert Counter(trial.state.name for trial in study.get_trials())["COMPLETE"] == 3
    retried = [trial.user_attrs[RETRY_OF] for trial in study.get_trials() if RETRY_OF in trial.user_attrs]
    assert len(retried) == len({*retried})
    assert Locked(tmp_path / "lock").is_free()


@pytest.mark.slow
def test_a_database_and_its_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    url = f"sqlite:///{tmp_path}/study.db"
    Search(SearchSettings(sampler="random"), tmp_path, storage=url).run(1)
    victim = start(tmp_path, 4, 30, url)
    search = Search(SearchSettings(sampler="random"), tmp_path, storage=url)

    def running() -> list[Any]:
        trials = [trial for trial in search.study.get_trials() if trial.state.name == "RUNNING"]
        return [trial for trial in trials if "parameters" in trial.user_attrs]

    while not running():
        assert victim.is_alive()
        time.sleep(0.2)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    (lost,) = running()
    time.sleep(4)
    search.run(4)
    trials = search.study.get_trials()
    assert sum(trial.state.name == "COMPLETE" for trial in trials) == 4
    assert sum(trial.params == lost.params for trial in trials if trial.state.name == "COMPLETE") == 1

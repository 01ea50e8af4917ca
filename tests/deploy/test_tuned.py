"""The chooser of ways under a fake clock, and its file."""

import contextlib
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from retina_fast.deploy.tuned import Chooser, machine, user_cache_file

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
X = torch.arange(1.0, 8.0)


class Clock:
    """Time passes only where a way says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def way(self, result, *seconds):
        """A way that takes the seconds one after the other, the last for good, and returns or raises the result."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if isinstance(result, Exception):
                raise result
            return result.clone()

        return run


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "choices.json"


def chosen(path, clock, **ways):
    chooser = Chooser(path, CPU, clock)
    choice = chooser.choose("layer", ways)
    chooser.save()
    return choice


# Which is chosen


def test_the_fastest_is_chosen(path, clock):
    ways = {"first": clock.way(X, 3), "second": clock.way(X, 1), "third": clock.way(X, 2)}
    assert chosen(path, clock, **ways) == "second"


def test_the_first_stays_where_it_is_the_fastest(path, clock):
    assert chosen(path, clock, first=clock.way(X, 1), second=clock.way(X, 2)) == "first"


def test_one_slow_call_does_not_decide(path, clock):
    """The first call compiles, and another was disturbed."""
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 90, 1, 80, 1)) == "second"


@pytest.mark.parametrize(
    "wrong",
    [
        RuntimeError("no engine"),
        torch.where(X == 3, torch.nan, X),
        torch.where(X == 3, torch.inf, X),
        X * 1.001,
        X[:-1],
        X.double(),
        torch.zeros_like(X),
    ],
    ids=["raises", "nan", "inf", "subtly wrong", "shape", "dtype", "zeros"],
)
def test_what_is_wrong_is_dropped_however_fast(path, clock, wrong):
    ways = {"first": clock.way(X, 3), "wrong": clock.way(wrong, 0), "right": clock.way(X, 2)}
    assert chosen(path, clock, **ways) == "right"


def test_rounding_is_not_wrong(path, clock):
    half = X.bfloat16()
    ways = {"first": clock.way(half, 2), "second": clock.way(half * (1 + 2**-8), 1)}
    assert chosen(path, clock, **ways) == "second"


def test_a_way_that_reads_its_output_before_it_writes(path, clock, monkeypatch):
    """As a fused conv with a factor of 0 does: it gets the memory that was freed last, which held NaN."""
    freed, full_like = [torch.zeros_like(X)], torch.full_like

    def recorded(*args):
        freed.append(full_like(*args))
        return freed[-1]

    def reading():
        return freed[-1].mul_(0).add_(X)

    monkeypatch.setattr(torch, "full_like", recorded)
    assert torch.equal(reading(), X)
    assert chosen(path, clock, first=clock.way(X, 1), reading=reading) == "first"


def test_a_way_that_writes_over_what_another_returned(path, clock):
    buffer = X.clone()

    def first():
        clock.now += 2
        return buffer

    def second():
        clock.now += 1
        return buffer.mul_(2)

    assert chosen(path, clock, first=first, second=second) == "first"


class Queue:
    """A GPU that runs what the host has launched, one after the other, and their two clocks in seconds."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def way(self, host, device):
        def run():
            self.launch(host, device)
            return X.clone()

        return run


@pytest.mark.parametrize("host", [200e-6, 900e-6, 3e-3])
def test_on_a_gpu_the_host_does_not_decide(host, path, monkeypatch):
    """Within a graph it launches nothing: a way of few slow launches is not the faster one there."""
    gpu = Queue()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = max(gpu.device, gpu.host)

        def query(self):
            return gpu.host >= self.time

        def synchronize(self):
            gpu.host = max(gpu.host, self.time)

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(0, cycles / 2e9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    chooser = Chooser(path, torch.device("cuda"))
    many, few = gpu.way(host=host, device=30e-6), gpu.way(host=20e-6, device=50e-6)
    assert chooser.choose("layer", {"few": few, "many": many}) == "many"
    assert chooser._time(many) == pytest.approx(30e-6)


# The file


def test_a_choice_is_remembered(path, clock):
    def never():
        raise AssertionError

    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert chosen(path, clock, first=never, second=never) == "second"
    assert json.loads(path.read_text())["choices"] == {machine(CPU): {"layer": "second"}}
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "7", '{"format": 3}', '{"format": 3, "choices": 3}', '{"format": 3, "choices": {"a": 3}}',
        json.dumps({"format": 2, "choices": {machine(CPU): {"layer": "first"}}}),
        json.dumps({"format": 3, "choices": {"torch 1.0 on another machine": {"layer": "first"}}}),
        json.dumps({"format": 3, "choices": {machine(CPU): {"layer": "a way of another version"}}}),
        json.dumps({"format": 3, "choices": {machine(CPU): {"layer": ["first"]}}}),
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_is_done_without(path, clock, content):
    path.parent.mkdir()
    path.write_text(content)
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert json.loads(path.read_text())["choices"][machine(CPU)] == {"layer": "second"}


def test_choices_of_other_machines_are_kept(path, clock):
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 3, "choices": {"another": {"layer": "first"}}}))
    chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1))
    assert json.loads(path.read_text())["choices"]["another"] == {"layer": "first"}


def test_a_folder_that_cannot_be_written(path, clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert chosen(tmp_path / "file" / "choices.json", clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)  # root, who may run the tests, can write anywhere
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert not path.exists()


def test_a_disk_that_fills_up_leaves_the_old_file_whole(path, clock, monkeypatch):
    chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1))
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    chooser = Chooser(path, CPU, clock)
    chooser.choose("other", {"first": clock.way(X, 1)})
    chooser.save()
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def _write_many(path: Path, name: str) -> None:
    for i in range(100):
        chooser = Chooser(path, CPU)
        chooser.choose(f"{name} {i}", {"first": lambda: X})
        chooser.save()


def test_two_processes_write_at_once(path):
    """The file is whole at every moment. A choice that the other process overwrote is made once more, no worse."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert json.loads(path.read_text())["format"] == 3
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    choices = json.loads(path.read_text())["choices"][machine(CPU)]
    assert "a 99" in choices or "b 99" in choices
    assert len(choices) > 90
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_the_default_file_is_in_the_users_folder():
    assert Path.home() in user_cache_file().parents

"""Names of files, folders and classes are printed and drawn as they are, whatever they hold."""

import io
import json
from collections import Counter

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from retina_fast import cli
from retina_fast.checkpoint import Checkpoint
from retina_fast.commands.detect import print_found
from retina_fast.data.errors import UserError, one_line
from retina_fast.data.faults import Fault, Kind
from retina_fast.deploy.bench import Speed, plot, report
from retina_fast.predict import lettering as module
from retina_fast.predict.detect import Found, detect
from retina_fast.predict.draw import draw_boxes, draw_detections
from retina_fast.predict.lettering import lettering, transliterated
from tests.cli.commands import Forked
from tests.cli.test_detect import Finder

NAMES = ["cat [final]", "[/b]", "[red]x[/red]", ":bomb: a", "木 дерево árbol", "$a_b$ 100%", r"back\slash", "[link=x]y"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def printed(show, width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console)
    return console.file.getvalue()  # pyrefly: ignore[missing-attribute]


@pytest.mark.parametrize("name", NAMES)
def test_what_detect_found_is_printed_as_it_is(name):
    first = {name: Counter({name: 1})}
    found = Found(51, [f"{name}.png: no such"], [f"{name}.gif: unfit"], Counter({name: 2}), first)
    text = printed(lambda console: print_found(found, console))
    for part in (f"{name}.png: no such", f"{name}.gif: unfit", f" {name} ", f"1 {name} ", f"2 {name} "):
        assert part in text


@pytest.mark.parametrize("name", NAMES)
def test_bench_prints_and_draws_every_title(name, tmp_path):
    speeds = [Speed("torchvision", 1, 2.0)]
    assert name in printed(lambda console: report(speeds, name, console))
    plot(speeds, name, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


STEERING = ["a\nerror: b", "\x1b[31ma", "a\u202eb", "\ufeffa", "a\u2028b", "a\rb", "a\0b", "a\udcffb", "a\x9b2Jb"]


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_a_terminal_is_printed_as_an_escape(name, tmp_path):
    shown = one_line(name)
    assert shown.isprintable()
    assert shown != name
    assert str(UserError(name)) == shown
    assert str(Fault(Kind.FILE, "a.json:", name)) == f"a.json: {shown}"
    found = Found(51, [name], [name], Counter({name: 2}), {name: Counter({name: 1})})
    text = printed(lambda console: print_found(found, console))
    assert text.count(shown) == 5
    assert name not in text


@pytest.mark.parametrize(
    "name", ["B\xe4ume", "\u6811\u3000\u6728", "a\xa0b", "\u0928\u094d\u200d\u0930", "\U0001f468\u200d\U0001f33e"]
)
def test_other_names_beyond_ascii_are_not(name):
    assert one_line(name) == name


def test_the_middle_of_what_is_too_long_to_read_is_left_out():
    error = str(UserError(f"begin.json: {'x' * 5000}, which is wrong"))
    assert len(error) < 1600
    assert error.startswith("begin.json: xxx")
    assert error.endswith("xxx, which is wrong")


def test_a_class_of_a_file_adds_no_line_to_what_check_says(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": "x\ny", "file_name": "a.png"}],
        "annotations": [{"id": "1\n2", "image_id": "x\ny", "category_id": "c\nd", "bbox": [4, 4, 0, 30]}],
        "categories": [{"id": "c\nd", "name": "Tree\n0 faults"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    line = ["check", f"{tmp_path}/a.json", "--images", str(tmp_path), "--workers", "0"]
    printed_lines = CliRunner().invoke(cli.app, line).output.splitlines()
    assert not any(line.startswith("0 faults") for line in printed_lines)
    assert any(r"annotation 1\n2 (a.png) has bbox" in line for line in printed_lines)
    content["annotations"] = [{"image_id": "gone\nerror: x", "category_id": "c\nd", "bbox": [4, 4, 9, 30]}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert r"belongs to image gone\nerror: x, which" in CliRunner().invoke(cli.app, line).output


def test_long_names_are_folded_not_cut():
    names = ["n" * 150 + end for end in ("1", "2")]
    found = Found(2, first={name: Counter({"thing": 1}) for name in names})
    text = printed(lambda console: print_found(found, console), width=80)
    assert text.count("n") >= 300
    assert "…" not in text


@pytest.mark.parametrize("name", ["tree [small]", "tree [/small]", ":deciduous_tree:", "木"])
def test_check_and_detect_by_the_command(name, tmp_path):
    (tmp_path / "in [1]").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "in [1]" / f"{name.replace('/', '')}.png")
    content = {
        "images": [{"id": 1, "file_name": f"{name.replace('/', '')}.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 30], "area": 900, "iscrowd": 0}],
        "categories": [{"id": 1, "name": name}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    result = CliRunner().invoke(
        cli.app, ["check", f"{tmp_path}/a.json", "--images", f"{tmp_path}/in [1]", "--workers", "0"]
    )
    assert result.exit_code == 0, result.output
    assert name in result.output
    result = CliRunner().invoke(
        cli.app, ["detect", f"{tmp_path}/in [1]", "--output", f"{tmp_path}/out [2]", "--workers", "0"]
    )
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/out [2]/detections.json" in result.output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_name(encoding, tmp_path, monkeypatch):
    """The command runs in a process of its own, whose output has that encoding."""
    (tmp_path / "in").mkdir()
    for name in ("木.png", "b\udcffytes.png"):
        Image.new("RGB", (64, 48)).save(tmp_path / "in" / name)
    (tmp_path / "its_encoding.py").write_text(
        f"import sys\nfor stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding={encoding!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = Forked(("detect", tmp_path / "in", "--output", tmp_path / "out", "--workers", 0), module="its_encoding")
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert "Traceback" not in output
    assert "Wrote" in output


SCRIPTS = ["Дерево", "木", "나무", "شجرة", "ต้นไม้", "वृक्ष", "δέντρο", "árbol", "🌲", "キ"]


def test_no_two_scripts_are_drawn_alike():
    box = {
        "boxes": torch.tensor([[2.0, 2, 390, 56]]),
        "scores": torch.ones(1),
        "labels": torch.zeros(1, dtype=torch.int64),
    }
    blank = torch.zeros(3, 60, 400, dtype=torch.uint8)
    drawn = {name: draw_detections(blank, box, [name, "other"]) for name in SCRIPTS}
    pictures = {bytes(picture.numpy()) for picture in drawn.values()}
    assert len(pictures) == len(SCRIPTS)
    empty = draw_boxes(blank, box["boxes"], ["#F0E442"])
    assert all((picture != empty).sum() > 60 for picture in drawn.values())


def test_without_a_font_of_the_script_names_are_spelt(monkeypatch):
    for cached in (module._font_for, module._others):
        cached.cache_clear()
    monkeypatch.setattr(module, "_others", list)
    font, _, shown = lettering(["Дерево", "木", "tree", "キ", "나무", "ÄÖ"])
    module._font_for.cache_clear()
    assert font is None
    assert shown["tree"] == "tree"
    assert shown["木"] == "u6728"
    assert shown["キ"] == "ki"
    assert shown["나무"] == "namu"
    assert all(text.isascii() or name == "ÄÖ" for name, text in shown.items())
    assert len(set(shown.values())) == len(shown)


def test_control_characters_become_spaces():
    assert lettering(["a\nb\tc\x1b"])[2] == {"a\nb\tc\x1b": "a b c"}
    assert transliterated("\U0010fffe", None) == "u10fffe"


def test_a_text_wider_than_its_box_is_left_out():
    image, boxes = torch.zeros(3, 60, 400, dtype=torch.uint8), torch.tensor([[2.0, 2, 60, 56], [100, 2, 390, 56]])
    without = draw_boxes(image, boxes, ["red", "red"])
    drawn = draw_boxes(image, boxes, ["red", "red"], ["a name too long", "a name too long"])
    assert torch.equal(drawn[..., :90], without[..., :90])
    assert not torch.equal(drawn[..., 90:], without[..., 90:])


def test_classes_of_every_script_in_a_whole_run(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    content = Checkpoint("", {}, ["木 [1]"], [7], {})
    found = detect(Finder(), content, [tmp_path / "a.png"], tmp_path / "out", 0.1, workers=0)
    assert found is not None
    assert found.objects == {"木 [1]": 100}
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["categories"] == [{"id": 7, "name": "木 [1]"}]

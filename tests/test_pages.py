"""The pages point at what is there: links between files, the map of the folders, the commands, the builders."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import retina_fast

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md"), *ROOT.glob("benchmarks/**/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def anchors(page: Path) -> set[str]:
    """The names by which GitHub and MyST link to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_parameters_of_the_builders():
    """The table of docs/drop_in.md."""
    page = (ROOT / "docs" / "drop_in.md").read_text()
    rows = re.findall(r"^\| `(res\w+)` \| ([\d.]+) M \| ([\d.]+) M \|$", page, re.MULTILINE)
    listed = {f"retinanet_{row[0]}_{kind}": row[i] for row in rows for i, kind in ((1, "fpn"), (2, "fpn_v2"))}
    assert {*listed, "retinanet_resnet18_fpn_lite"} == {name for name in dir(retina_fast) if "retinanet_res" in name}
    for name, millions in listed.items():
        with torch.device("meta"):
            model = getattr(retina_fast, name)(num_classes=91, weights_backbone=None)
        assert f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}" == millions, name


def test_the_map_names_every_folder():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {str(folder) for file in listed.stdout.splitlines() for folder in Path(file).parents} - {"."}
    named = set(re.findall(r"^\| `([^`]+?)/?` \|", CONTRIBUTING, re.MULTILINE)) - {"retina_fast/kernels"}
    assert named == folders


def test_nobody_is_told_to_install_a_release():
    """There is none: pages name extras of a checkout, and errors the packages that are missing."""
    files = [*PAGES, *ROOT.glob("examples/*.py"), *ROOT.glob("retina_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    assert [file for file in files if re.search(r"retina_fast\[|install '?retina[_-]fast", file.read_text())] == []


PATH = re.compile(r"\b(?:\.ci|benchmarks|demo|docs|examples|kernels|retina_fast|tests)/[\w/]+\.(?:py|md|pt)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    for path in PATH.findall(page.read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_name_exist(page):
    for module in re.findall(r"python -m ((?:benchmarks|demo|examples|tests)(?:\.\w+)*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        program = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert program.is_file(), module
        assert path.is_dir() or '__name__ == "__main__"' in program.read_text(), module

"""Settings of Sphinx for `make docs`: the pages of this folder, and the API reference from the docstrings."""

import re
from typing import Any

project = "retina_fast"
copyright = "the authors of retina_fast, BSD-3-Clause"
extensions = ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["api/modules.rst"]
html_theme = "furo"
html_title = "retina_fast"

default_role = "code"  # docstrings write `name`, as markdown does
myst_heading_anchors = 3
suppress_warnings = ["ref.python"]  # a name that a package passes on has two pages

apidoc_modules = [
    {
        "path": "../retina_fast",
        "destination": "api",  # not in git
        "exclude_patterns": ["../retina_fast/cli.py", "../retina_fast/commands"],
        "automodule_options": {"members"},
        "separate_modules": True,
        "module_first": True,
        "implicit_namespaces": True,  # kernels has no __init__.py
        "follow_links": True,  # and is a link
        "include_private": False,
    }
]
autodoc_member_order = "bysource"
autodoc_default_options = {"special-members": "__call__"}
autodoc_inherit_docstrings = False  # those of torch and Lightning are written for other programs
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def read_as_markdown(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Change what reStructuredText would read otherwise than its author meant.

    "num_classes: K." is no numbered list, and an indented block of a module's docstring is code.
    """
    lines[:] = [re.sub(r"^(\s*(?::.*?:)?\s*)([A-Z])\.(?=\s|$)", r"\1\\\2.", line) for line in lines]
    if what != "module":
        return
    marked: list[str] = []
    for line in lines:
        if line.startswith("    ") and marked and not marked[-1].startswith("    "):
            if marked[-1]:
                marked.append("")
            marked += ["::", ""]
        elif line and not line.startswith(" ") and marked and marked[-1].startswith("    "):
            marked.append("")
        marked.append(line)
    lines[:] = marked


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", read_as_markdown, priority=600)  # after napoleon

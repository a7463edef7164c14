"""The documentation as a site, built by Sphinx: `bash scripts/docs.sh`. Pages are Markdown, those of the API are docstrings.

The source folder is the repository itself, so that the links that work on a Git server work on the site too.
"""

from __future__ import annotations

import re
from typing import Any

project = "efficient_asr"
author = copyright = "The efficient_asr authors"
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "recipes/*/README.md",
    "results/README.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["docs/images/**"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes of dataclasses are documented once
napoleon_google_docstring = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_mock_imports = [
    "ctranslate2",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "ray",
    "kenlm",
    "gradio",
    "peft",
    "yt_dlp",
    "playwright",
]
apidoc_modules = [
    {"path": "../efficient_asr", "destination": "docs/api", "separate_modules": True, "module_first": True}
]

html_theme = "furo"
html_title = "efficient_asr"
suppress_warnings = ["ref.python"]  # a name that a package exports again has two targets


CODE = re.compile(r":\w+:`[^`]*`|``.*?``|`([^`]+)`(?![`_])(\w?)")


def as_parameters(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let Napoleon see SpeechBrain's heading `Arguments` as NumPy's `Parameters`; show commands and `code` as code."""
    if what == "module":  # what is indented are commands, or the lines of a directive
        for i in range(len(lines) - 1, 1, -1):
            first = lines[i].startswith("    ") and not lines[i - 1].strip()
            before = next((line for line in reversed(lines[:i]) if line.strip()), "")
            if first and not before.startswith((" ", "..", "-")):
                lines[i:i] = ["::", ""]
    for i, line in enumerate(lines[:-1]):
        if line.strip() == "Arguments" and set(lines[i + 1].strip()) == {"-"}:
            indent = line[: len(line) - len(line.lstrip())]
            lines[i], lines[i + 1] = f"{indent}Parameters", f"{indent}----------"
    lines[:] = [CODE.sub(as_code, line) for line in lines]


def as_code(found: re.Match[str]) -> str:
    """Return code between single backticks as reStructuredText's code; a letter that follows is separated by an empty space."""
    if found[1] is None:  # a role, such as :math:
        return found[0]
    return f"``{found[1]}``" + (f"\\ {found[2]}" if found[2] else "")


def setup(app: Any) -> None:
    """Register the conversion of docstrings before Napoleon's (default priority 500)."""
    app.connect("autodoc-process-docstring", as_parameters, priority=100)

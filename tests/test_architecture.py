"""Imports point down only, and what the design fixes stays so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import from layers with a smaller number, and from its own.
LAYERS = {
    "errors": 0, "files": 0, "locks": 0, "_torchaudio": 0, "languages": 1, "seeding": 1, "text": 1, "command_line": 1,
    "settings": 1, "distributed": 1, "checkpoints": 2, "data": 2, "corpora": 3, "augmentation": 3, "models": 3,
    "techniques": 4, "evaluation": 4, "loop": 4, "brains": 5, "sweep": 5, "report": 5, "schedules": 4, "distilling": 5,
    "routing": 2, "routing_data": 5, "routing_report": 6, "experts_report": 6, "experiment_data": 6, "experiment": 6,
    "app": 7, "recipes": 7, "scripts": 7,
}  # fmt: skip
FORBIDDEN = [  # (importer, imported), whatever their layers
    ("techniques", "brains"), ("techniques", "evaluation"), ("evaluation", "techniques"), ("evaluation", "brains"),
    ("corpora", "models"), ("models", "corpora"), ("report", "brains"), ("report", "techniques"), ("report", "models"),
    ("models", "techniques"), ("models", "evaluation"), ("loop", "models"), ("loop", "evaluation"), ("loop", "techniques"),
]  # fmt: skip


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "efficient_asr":
        return relative.parts[0]
    return relative.parts[1].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "efficient_asr" and len(pieces) > 1 and pieces[1] in LAYERS:
                parts.add(pieces[1])
    return parts


SOURCES = [p for folder in ("efficient_asr", "recipes", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        pytest.skip("the package's front door may open any room")
    for part in imported_parts(path) - {own}:
        assert LAYERS[part] <= LAYERS[own], f"{own} imports {part}, which lies above it"
        assert (own, part) not in FORBIDDEN, f"{own} must not import {part}"


def test_the_rules_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("from efficient_asr import brains\nimport efficient_asr.evaluation.wer\n")
    assert imported_parts(source) == {"brains", "evaluation"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/train.py")), ids=lambda p: p.parent.name)
def test_recipes_are_short(path: Path) -> None:
    assert 20 <= len(path.read_text().splitlines()) <= 120
    assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "efficient_asr").rglob("*.py")), ids=lambda p: p.name)
def test_files_stay_readable(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert lines <= 80, f"{node.name} has {lines} lines"
            if not node.name.startswith("_"):
                assert node.returns is not None or node.name.startswith("__"), f"{node.name} has no return type"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "efficient_asr" / "techniques").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_techniques_cite_their_paper(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert "arXiv" in docstring and "eviation" in docstring and ":math:" in docstring

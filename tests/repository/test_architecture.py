"""Imports point down only, without circles, and what the design fixes stays so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from efficient_asr.utils.technique import techniques

# A wing may import from wings with a smaller number.
LEVELS = {
    "utils": 0, "text": 1, "settings": 2, "data": 2, "models": 3, "corpora": 3, "inference": 4, "evaluation": 5, "training": 6,
    "reporting": 6, "techniques": 7, "web": 7, "commands": 8, "recipes": 8, "scripts": 9,
}  # fmt: skip
SHARED = [wing for wing, level in LEVELS.items() if level < LEVELS["techniques"]]
PACKAGE = ROOT / "efficient_asr"
SOURCES = [p for folder in ("efficient_asr", "recipes", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]
FORWARDERS = "this path works for one more release"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing_of(module: str) -> str:
    pieces = module.split(".")
    pieces = [piece for piece in pieces if piece != "__main__"]
    return pieces[0] if pieces[0] != "efficient_asr" else (pieces[1] if len(pieces) > 1 else "")


def imported_modules(source: str, modules: set[str]) -> set[str]:
    """Return the modules of the package that a source imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), "a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in modules}
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import themselves, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for module in graph.get(left.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    left.append(module)
        return seen

    return [module for module in graph if module in reachable(module)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    own = wing_of(module)
    for imported in imported_modules(path.read_text(encoding="utf-8"), {*MODULES}):
        wing = wing_of(imported)
        if own and wing and wing != own:
            assert LEVELS[wing] < LEVELS[own], f"{module} imports {imported}, which does not lie below it"


def test_there_are_no_import_circles() -> None:
    graph = {
        name: imported_modules(path.read_text(encoding="utf-8"), {*MODULES}) - {name} for name, path in MODULES.items()
    }
    graph = {name: found - {"efficient_asr"} for name, found in graph.items()}
    assert circles(graph) == []


def test_the_rules_can_fail() -> None:
    source = "import efficient_asr.utils.files\ndef f():\n    from efficient_asr.training import loop\n"
    assert imported_modules(source, {*MODULES}) == {
        "efficient_asr.training", "efficient_asr.training.loop", "efficient_asr.utils.files",
    }  # fmt: skip
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_the_package_root_holds_wings_only() -> None:
    assert sorted(p.name for p in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("__pycache__", "assets")} == {
        wing for wing in LEVELS if wing not in ("recipes", "scripts")
    }


@pytest.mark.parametrize("wing", SHARED)
def test_shared_wings_name_no_technique(wing: str) -> None:
    names = [technique.name for technique in techniques()]
    assert len(names) >= 8
    pattern = re.compile(
        rf"(?<![a-z_])({'|'.join(names)}|{'|'.join(n.replace('_', ' ') for n in names)})(?![a-z_])", re.I
    )
    for path in sorted((PACKAGE / wing).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = pattern.search(line)
            assert match is None, f"{path.relative_to(ROOT)}:{number} names the technique '{match[0]}'"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/train.py")), ids=lambda p: p.parent.name)
def test_recipes_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if FORWARDERS not in text:
        assert 20 <= len(text.splitlines()) <= 120
        assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_readable(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert lines <= 60, f"{node.name} has {lines} lines"
            if not node.name.startswith("_"):
                assert node.returns is not None, f"{node.name} has no return type"


def modules_with_equations() -> list[Path]:
    """Return the files that hold a technique's own mathematics: those of its parts and losses."""
    found = {(PACKAGE / "techniques" / "distillation" / "losses.py")}
    for technique in techniques():
        base = Path(*technique.module.split("."))
        names = {reference.partition(":")[0] for reference in technique.parts.values()} or {""}
        for name in names if not (ROOT / base).is_dir() else names - {""}:
            found.add(ROOT / (base / f"{name}.py" if name else base.with_suffix(".py")))
    return sorted(found)


@pytest.mark.parametrize("path", modules_with_equations(), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_techniques_cite_their_paper(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert "arXiv" in docstring and "eviation" in docstring and ":math:" in docstring

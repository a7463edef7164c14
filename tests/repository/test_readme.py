"""Commands and links in the documentation name things that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from runs import run_script
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.commands import COMMANDS
from efficient_asr.settings.yaml import merge_includes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
PAGES.append(ROOT / "efficient_asr" / "assets" / "README.md")


def commands(page: Path) -> list[list[str]]:
    """Indented shell commands, continuation lines joined, comments dropped; and those in backquotes that stand alone."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    indented = re.findall(r"^    ((?:python|torchrun|bash|efficient-asr|OMP\S+) .*)$", text, re.MULTILINE)
    for line in indented + re.findall(r"`((?:python|torchrun|bash|efficient-asr) [^`\n]+)`", text):
        if "<exp>" not in line:
            found.append(shlex.split(line.replace("|", " ").replace("{", "").replace("}", ""), comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_existing_files_and_keys(page: Path) -> None:
    for words in commands(page):
        for word in words:
            if re.match(r"(recipes|scripts|hparams)/", word):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"
        yamls = [word for word in words if word.startswith("hparams/")]
        if yamls:
            keys = set(merge_includes(ROOT / yamls[0])) | set(RunOptions().as_dict()) | {"estimate"}
            for word in words[words.index(yamls[0]) :]:
                if word.startswith("--"):
                    assert word[2:].split("=")[0] in keys, f"{page.name}: {word}"


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_the_console_script_have_the_documented_options(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"efficient_asr.commands.{name}").main(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    shown = [words for page in PAGES for words in commands(page) if words[:2] == ["efficient-asr", name]]
    assert shown
    for words in shown:
        assert {word for word in words if word.startswith("--")} <= known, " ".join(words)


def test_readme_has_the_two_commands() -> None:
    first = [words[:2] for words in commands(ROOT / "README.md")]
    assert ["bash", "scripts/quickstart.sh"] in first and ["bash", "scripts/test.sh"] in first


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results" / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_recipe_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "recipes").glob("*/README.md"):
        assert f"recipes/{page.parent.name}" in text


SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), *sorted((ROOT / "recipes").glob("*/*.sh"))]


@pytest.mark.parametrize("path", [*SCRIPTS, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_scripts_and_pages_import_exists(path: Path) -> None:
    """Python inside of shell scripts and pages is not seen by the linter, nor by a move of modules."""
    for module, names in re.findall(
        r"^[^#\n]*?\bfrom (efficient_asr[\w.]*) import ([\w, ]+)", path.read_text(), re.MULTILINE
    ):
        for name in (each.split(" as ")[0].strip() for each in names.split(",")):
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{path.name}: {module}.{name}"


CALL = re.compile(r"((?:recipes|scripts)/[\w/]+\.py|-m efficient_asr \w+)((?:[^\n;|&#`]|\\\n)*)")


def calls() -> dict[str, dict[str, set[str]]]:
    """Options in all calls of programs without a YAML file: program -> option -> files that show it."""
    programs = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "recipes").glob("*/*.py")]
    found: dict[str, dict[str, set[str]]] = {}
    for path in [*PAGES, *SCRIPTS, *programs]:
        text = path.read_text().replace("efficient-asr ", "-m efficient_asr ")
        for program, rest in CALL.findall(text):
            if not re.search(r"hparams|yaml|train\.py|label\.py hparams", program + rest):
                options = found.setdefault(program, {})
                for option in re.findall(r"(?<=[\s\[])--[a-zA-Z]\w+", rest):
                    options.setdefault(option, set()).add(path.name)
    return found


@pytest.mark.parametrize("program", sorted(program for program, options in calls().items() if options))
def test_options_that_are_shown_exist(program: str) -> None:
    words = [program] if program.endswith(".py") else ["efficient_asr/__main__.py", program.split()[-1]]
    done = run_script(*words, "--help")
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--\w+", done.stdout))
    unknown = {option: files for option, files in calls()[program].items() if option not in known}
    assert not unknown


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_call_files_and_keys_that_exist(path: Path) -> None:
    for word in re.findall(r"(?<![\w/$])(?:recipes|scripts|hparams)/[\w/.]+\.(?:py|sh|yaml)", path.read_text()):
        assert (ROOT / word).is_file(), f"{path.name}: {word}"

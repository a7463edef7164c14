"""docs/reference/ matches the code."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "make_reference.py"


@pytest.mark.parametrize("page", ["yaml_keys", "result_fields", "glossary"])
def test_a_reference_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
    assert getattr(script, page)() == written, "run: python scripts/make_reference.py"

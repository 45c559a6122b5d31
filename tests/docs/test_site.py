"""The site that `nox -s docs` builds: every page is in its menu, and what is written for readers of the repository works there, too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import pytest
from mkdocs.config import load_config
from pages import ROOT, Page


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """`scripts/site_hooks.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["site_hooks"] = module
    spec.loader.exec_module(module)
    return module


def listed(nav: Any) -> list[str]:
    """Return the files in a menu, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [file for part in parts for file in listed(part)]


def test_every_page_is_in_the_menu_once(hooks: ModuleType) -> None:
    found = listed(load_config(str(ROOT / "mkdocs.yml"))["nav"])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(found) == sorted([*pages, *hooks.BESIDE.values(), hooks.CHANGES])


def test_the_entry_of_the_reference_leads_to_each_of_its_pages() -> None:
    links = set(Page(ROOT / "docs" / "api.md").links)
    assert {f"api/{path.name}" for path in (ROOT / "docs" / "api").glob("*.md")} <= links


def test_the_first_page_leads_to_every_page_in_docs() -> None:
    links = set(Page(ROOT / "docs" / "index.md").links)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= links


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("index.md", "../README.md", "readme.md"),
        ("index.md", "lora.md#config", "lora.md#config"),
        ("api/models.md", "../files.md", "../files.md"),
        ("api/models.md", "../../CONTRIBUTING.md#tests", "../contributing.md#tests"),
        ("readme.md", "docs/lora.md", "lora.md"),
        ("readme.md", "CONTRIBUTING.md", "contributing.md"),
        ("contributing.md", "README.md", "readme.md"),
        ("readme.md", "https://example.com/docs/x", "https://example.com/docs/x"),
    ],
)
def test_a_link_leads_in_the_site_where_it_leads_in_the_repository(hooks: ModuleType, page: str, link: str, leads_to: str) -> None:
    assert hooks.target(link, page) == leads_to


def test_the_name_of_a_file_becomes_the_title_of_its_block(hooks: ModuleType) -> None:
    class Here:
        class file:
            src_uri = "index.md"

    text = "```python src/a.py\nX = 1\n```\n"
    assert hooks.on_page_markdown(text, Here, None, None).startswith('```python title="src/a.py"\nX = 1\n```')


def test_names_lead_to_the_reference(hooks: ModuleType) -> None:
    assert hooks.with_links("Use `get_peft_model`, `PeftModel.generate`.") == (
        "Use [`get_peft_model`][peft_core.get_peft_model], [`PeftModel.generate`][peft_core.PeftModel.generate]."
    )
    for text in ("`no_such_name`", "`Linear`", "``get_peft_model``", "[`get_peft_model`](x.md)", "`from_pretrained`"):
        assert hooks.with_links(text) == text


def test_blocks_and_headings_have_no_links(hooks: ModuleType) -> None:
    page = "# `Plan`\n`Plan`\n```python\n`Plan`\n```\n`Plan`\n"
    assert hooks.outside_blocks(page, str.upper) == "# `Plan`\n`PLAN`\n```python\n`Plan`\n```\n`PLAN`\n"


def test_changes_stand_under_their_kind(hooks: ModuleType) -> None:
    text = hooks.changes()
    for file in (ROOT / "changes").glob("*.feature.md"):
        sentence = file.read_text(encoding="utf-8").strip()
        assert text.index("## New") < text.index(sentence)
        assert "\n## " not in text[text.index("## New") + 5 : text.index(sentence)]


def test_comments_of_attributes_are_documentation(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text('#: above,\n#: in two lines\nA = 1\nB = 2  #: behind\nC = 3  # no documentation\nD = 4\n"""Its own."""\n')
    loader = griffe.GriffeLoader(search_paths=[tmp_path], extensions=griffe.load_extensions(hooks.Comments))
    module = loader.load("some")
    texts = {name: member.docstring.value if member.docstring else None for name, member in module.members.items()}
    assert texts == {"A": "above, in two lines", "B": "behind", "C": None, "D": "Its own."}

"""What mkdocs has to be told of pages and sources that are written for other readers: files beside docs/, names behind fences, comments."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: file of the repository → its page in the site
BESIDE = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "licence.md"}
CHANGES = "changes.md"
_FENCE = re.compile(r"^(```+)(\w+) ([\w./-]+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_BLOCK = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?!`)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files beside docs/, and the sentences of changes/ as one page."""
    for name, page in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text if name.endswith(".md") else f"# Licence\n\n```text\n{text}```\n"))
    files.append(File.generated(config, CHANGES, content=changes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Show names of files as titles, let public names lead to the reference, and links to files beside docs/ to their pages."""
    markdown = _FENCE.sub(r'\1\2 title="\3"', outside_blocks(markdown, with_links))
    return _LINK.sub(lambda found: f"]({target(found[1], page.file.src_uri)})", markdown)


def target(link: str, page: str) -> str:
    """Return where a link leads in the site.

    Args:
        link: as it stands in the page.
        page: the page, from docs/ (``"api/models.md"``).
    """
    path, mark, anchor = link.partition("#")
    if page in (*BESIDE.values(), CHANGES):  # they stand beside docs/ in the repository, and in it in the site
        path = BESIDE.get(path, path.removeprefix("docs/"))
    else:
        up = "../" * (page.count("/") + 1)
        name = path.removeprefix(up)
        if path.startswith(up) and name in BESIDE:
            path = "../" * page.count("/") + BESIDE[name]
    return path + mark + anchor


@functools.cache
def shown() -> dict[str, str]:
    """Return a public name, or a member (``"PeftModel.generate"``), → what the reference calls it; what several packages have is left out."""
    found: dict[str, set[str]] = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for full in _DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            for name in (full, full.partition(".")[2]):
                found.setdefault(name, set()).add(full)
    return {name: next(iter(places)) for name, places in found.items() if len(places) == 1}


def with_links(text: str) -> str:
    """Return a text in which the names that the reference shows, where they stand in backticks, lead there."""
    return _NAME.sub(lambda found: f"[`{found[1]}`][{shown()[found[1]]}]" if found[1] in shown() else found[0], text)


def outside_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """Return a page with everything changed but headings and fenced blocks."""
    parts, last = [], 0
    for block in (*_BLOCK.finditer(markdown), None):
        text = markdown[last : block.start() if block else None]
        parts += ["".join(line if line.startswith("#") else change(line) for line in text.splitlines(keepends=True)), block[0] if block else ""]
        last = block.end() if block else last
    return "".join(parts)


def changes() -> str:
    """Return what users can notice since the last release: `changes/<issue>.<kind>.md`, by kind."""
    parts = ["# Changes since the last release\n"]
    for kind, head in (("feature", "New"), ("fix", "Mended"), ("removal", "Removed"), ("doc", "Documentation")):
        found = sorted((ROOT / "changes").glob(f"*.{kind}.md"))
        if found:
            parts += [f"## {head}\n", *(file.read_text(encoding="utf-8").strip() + "\n" for file in found)]
    return "\n".join(parts)


class Links(griffe.Extension):
    """Lets names in docstrings lead to where the reference shows them."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Be told of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = with_links(obj.docstring.value)


class Comments(griffe.Extension):
    """Takes a comment that begins with ``#:``, on the line of an attribute or above it, as the attribute's documentation."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Be told of an attribute."""
        if attr.docstring is not None or attr.lineno is None or not isinstance(attr.filepath, Path):
            return
        lines = attr.filepath.read_text(encoding="utf-8").splitlines()
        behind = re.search(r"#: (.+)$", lines[attr.lineno - 1])
        above: list[str] = []
        for line in reversed(lines[: attr.lineno - 1]):
            comment = re.match(r"\s*#: (.+)$", line)
            if comment is None:
                break
            above.insert(0, comment[1])
        text = behind[1] if behind else " ".join(above)
        if text:
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)

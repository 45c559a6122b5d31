"""The pages of the documentation as data: blocks of code with the line on which they stand, links, headings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(```+)(.*)$")
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\Z")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        language: the first word behind the opening fence.
        code: the lines between the fences.
        line: number of its first line in the page.
        output: the text block that follows directly on a Python block: what it must print.
        named: the second word behind the opening fence, a file's name.
    """

    language: str
    code: str
    line: int
    output: str | None = None
    named: str | None = None

    @property
    def file(self) -> str | None:
        """The name behind the fence (```` ```python folder/name.py````) or in a first line such as ``# folder/name.py``: a file, not run."""
        if self.named is not None:
            return self.named
        first, _, _ = self.code.partition("\n")
        found = _FILE.match(first.strip())
        return found.group(1) if found else None


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path from the root of the repository, if it is in there."""
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        found: list[Block] = []
        code: list[str] = []
        language, start, fence, end = "", 0, "", -1
        for number, line in enumerate(self.text.splitlines(), 1):
            mark = _FENCE.match(line)
            if fence:
                if mark and mark.group(1) == fence and not mark.group(2):
                    word, _, named = language.partition(" ")
                    block = Block(word, "\n".join(code) + "\n", start, named=named.strip() or None)
                    # only blank lines between: it is the output of the block before
                    if word == "text" and found and found[-1].language == "python" and end == start:
                        found[-1] = replace(found[-1], output=block.code)
                    else:
                        found.append(block)
                    fence, end = "", number + 2
                else:
                    code.append(line)
            elif mark:
                fence, language, code, start = mark.group(1), mark.group(2).strip(), [], number + 1
            elif not line.strip() and end == number + 1:
                end = number + 2
        assert not fence, f"{self.name}: a block that begins on line {start - 1} does not end"
        return found

    @cached_property
    def prose(self) -> str:
        """The page without its blocks."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    @property
    def links(self) -> list[str]:
        return _LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What `#…` can point at: headings as GitHub turns them into ids."""
        heads = re.findall(r"^#+ +(.+)$", self.prose, flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def pages() -> list[Page]:
    """Return README.md and everything in docs/, and what the packages show on the index."""
    return [Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("packages/*/README.md")))]


def sessions() -> set[str]:
    """Return the names of the nox sessions, read from the noxfile (nox itself need not be installed)."""
    return {name for function in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body for name in _session(function)}


def _session(node: ast.stmt) -> Iterator[str]:
    if not isinstance(node, ast.FunctionDef):
        return
    for decorator in node.decorator_list:
        target, keywords = (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
        if isinstance(target, ast.Attribute) and target.attr == "session":
            named = [k.value.value for k in keywords if k.arg == "name" and isinstance(k.value, ast.Constant)]
            yield str(named[0]) if named else node.name

"""The API reference as data: each directive (`::: package.Name`) of docs/api/ with what it shows and the blocks that are its example."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pages import ROOT, Block, Page

import peft_core
from peft_core import errors

#: the packages whose public names the reference must have
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/src/peft_*/__init__.py"))
ERRORS = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.PeftError)}
_DIRECTIVE = re.compile(r"^::: ([\w.]+)\s*$")


@dataclass(frozen=True)
class Entry:
    """One directive.

    Args:
        name: what it shows, from the package (``"peft_core.PeftModel.merge_adapter"``).
        page: where it is.
        line: of the directive.
        options: of mkdocstrings.
        examples: the Python blocks behind it, up to the next heading or the next directive that follows a block.
    """

    name: str
    page: Page
    line: int
    options: dict[str, Any]
    examples: list[Block] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """The object itself; of a method or property what the class has in its `__dict__`."""
        package, name, *rest = self.name.split(".")
        found: Any = getattr(importlib.import_module(package), name)
        for part in rest:
            found = inspect.getattr_static(found, part)
        return found

    @property
    def members(self) -> list[str]:
        """Names of the members of a class that the page shows with it."""
        if not inspect.isclass(self.value):
            return []
        chosen = self.options.get("members")
        if isinstance(chosen, list):
            return chosen
        if chosen is False:
            return []
        return [name for name, value in vars(self.value).items() if not name.startswith("_") and function_of(value) is not None]


@functools.cache
def entries() -> dict[str, Entry]:
    """Return the directives of docs/api.md and docs/api/, by name.

    Raises:
        AssertionError: a name has two.
    """
    found: dict[str, Entry] = {}
    for path in (ROOT / "docs" / "api.md", *sorted((ROOT / "docs" / "api").glob("*.md"))):
        for entry in _of(Page(path)):
            assert entry.name not in found, f"{entry.page.name}:{entry.line}: {entry.name} is also in {found[entry.name].page.name}"
            found[entry.name] = entry
    return found


def anchors(path: Path) -> set[str]:
    """Return what `#…` can point at besides headings: the names that a page shows."""
    return {entry.name for entry in _of(Page(path))}


def _of(page: Page) -> Iterator[Entry]:
    lines = page.text.splitlines()
    starts = {block.line: block for block in page.blocks}
    waiting: list[Entry] = []
    fence, seen_block = "", False
    for number, line in enumerate(lines, 1):
        mark = re.match(r"^(```+)", line)
        if mark and (not fence or line == fence):
            fence = "" if fence else mark.group(1)
            block = starts.get(number + 1)
            if fence and block is not None and block.language == "python":
                seen_block = True
                for entry in waiting:
                    entry.examples.append(block)
        elif fence:
            continue
        elif line.startswith("#"):
            waiting, seen_block = [], False
        elif directive := _DIRECTIVE.match(line):
            if seen_block:
                waiting, seen_block = [], False
            options = "\n".join(_indented(lines[number:]))
            entry = Entry(directive[1], page, number, (yaml.safe_load(options) or {}).get("options", {}))
            waiting.append(entry)
            yield entry


def _indented(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("    "):
            return
        yield line


def public_names() -> list[str]:
    """Return what the packages offer (``"peft_core.PeftModel"``); versions and what a package passes on from core excepted."""
    return [name for name in _offered() if name not in passed_on()]


def passed_on() -> list[str]:
    """Return what packages offer that is core's (``"peft_lora.hotswap_adapter"``): shown once, where core's names are."""
    return [name for name in _offered() if not name.startswith("peft_core.") and _of_core(name)]


def _offered() -> list[str]:
    return [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__ if not name.startswith("__")]


def _of_core(name: str) -> bool:
    package, public = name.split(".")
    return getattr(importlib.import_module(package), public) is getattr(peft_core, public, None)


def uses(code: str, package: str, name: str, member: str | None = None) -> bool:
    """Return whether code does something with a public name (or a member of it), besides importing it.

    Args:
        code: a Python block.
        package: the name's package.
        name: the public name.
        member: an attribute of it.
    """
    for node in ast.walk(ast.parse(code)):
        if member is not None:
            if isinstance(node, ast.Attribute) and node.attr == member:
                return True
        elif (isinstance(node, ast.Name) and node.id == name) or (
            isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.value, ast.Name) and node.value.id == package
        ):
            return True
    return False


def function_of(value: Any) -> Any:
    """Return the function behind what a class has in its `__dict__`; None for what is no function."""
    if isinstance(value, (classmethod, staticmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value if inspect.isfunction(value) else None


def parameters(function: Any) -> list[str]:
    """Return the parameters that a docstring must name."""
    names = list(inspect.signature(inspect.unwrap(function)).parameters)
    first = names[:1] if names[:1] in (["self"], ["cls"]) else []
    return [name for name in names[len(first) :] if not name.startswith("_")]


def unnamed_parameters(function: Any, *docstrings: str | None) -> list[str]:
    """Return the parameters that no docstring has as a word.

    Args:
        function: whose.
        docstrings: its own, and those of the methods that it overrides.
    """
    text = "\n".join(found for found in docstrings if found)
    return [name for name in parameters(function) if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def lacks_shapes(function: Any, *docstrings: str | None) -> bool:
    """Return whether a function takes or returns a tensor, and no docstring says of what shape: ``(batch, tokens)``, "scalar", "layout", "shape".

    Tensors by name (state dicts) have the shapes of what they are named after.

    Args:
        function: whose annotations tell.
        docstrings: its own, those of the methods that it overrides, and what its classes say of all methods.
    """
    annotations = re.sub(r"(?:Mapping|dict)\[str, Tensor\]", "", str(inspect.signature(inspect.unwrap(function))))
    text = "\n".join(found for found in docstrings if found)
    return bool(re.search(r"\bTensor\b", annotations)) and not re.search(r"\([\w·/∏ ]+,[^()]*\)|\bscalar|\bshapes?\b|\blayout\b", text)


def unnamed_errors(function: Any, *docstrings: str | None) -> list[str]:
    """Return the typed errors that no docstring names, themselves or by a base class, and that the function raises, or a helper of its module."""
    text = "\n".join(found for found in docstrings if found)
    return sorted(name for name in _raised(inspect.unwrap(function)) if not any(base in text for base in _and_bases(name)))


def _raised(function: Any, depth: int = 2) -> set[str]:
    """Return the typed errors that a function raises by itself or by functions of its own module that begin with an underscore."""
    found = set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tried = [part for node in ast.walk(tree) if isinstance(node, ast.Try) and node.handlers for part in node.body]
    caught = {call for part in tried for call in ast.walk(part)}  # what a helper raises there may not come out
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} & set(ERRORS)
        elif depth and node not in caught and isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("_"):
            helper = function.__globals__.get(node.func.id)
            if inspect.isfunction(helper) and helper.__module__ == function.__module__:
                found |= _raised(helper, depth - 1)
    return found


def _and_bases(name: str) -> list[str]:
    return [cls.__name__ for cls in ERRORS[name].__mro__ if issubclass(cls, errors.PeftError) and cls is not errors.PeftError]


def overridden(cls: type, name: str) -> list[str | None]:
    """Return the docstrings of a method in a class and in all bases that have it, nearest first; and the names in backticks of the classes' own.

    A class may say once what its methods take (``In all methods, `adapter` is ...``).
    """
    found = [function_of(vars(base)[name]) for base in cls.__mro__ if name in vars(base)]
    common = [word for base in cls.__mro__ for line in common_to_methods(base) for word in re.findall(r"`[\w*]+`", line)]
    return [*(function.__doc__ for function in found if function is not None), " ".join(common)]


def common_to_methods(cls: type) -> list[str]:
    """Return the paragraphs in which a class says what all its methods take."""
    paragraphs = re.split(r"\n\s*\n", vars(cls).get("__doc__") or "")
    return [paragraph for paragraph in paragraphs if paragraph.strip().startswith("In all methods, ")]


def comment_of(name: str) -> str:
    """Return the documentation of a constant: the comment that begins with ``#:`` on its line or above it; empty without one."""
    package, constant = name.split(".")
    stub = Path(importlib.import_module(package).__file__ or "").with_suffix(".pyi").read_text(encoding="utf-8")
    home = re.search(rf"^from \.(\S+) import {constant} as ", stub, re.M)[1]  # type: ignore[index]
    lines = inspect.getsource(importlib.import_module(f"{package}.{home}")).splitlines()
    for number, line in enumerate(lines):
        if re.match(rf"{constant}\b.*=", line):
            same = re.search(r"#: (.+)$", line)
            above = re.match(r"#: (.+)$", lines[number - 1])
            found = same or above
            return found[1] if found else ""
    return ""

"""What is checked of any rows: their checks by name and kind, the arguments of their members, and checks that stand in no row."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from page.table import Row


def cases(rows: Iterable[Row]) -> list[Any]:
    """Return (check, kind of adapter or None) for each check of each row, with the row's section and name as id."""
    found = []
    for row in rows:
        for check in row.checks:
            for kind in getattr(check, "kinds", (None,)):
                found.append(pytest.param(check, kind, id=f"{row.section} {row.name}-{check.__name__}{f'-{kind}' if kind else ''}"))
    return found


def call(check: Callable[..., None], kind: str | None, request: pytest.FixtureRequest) -> None:
    """Call a check with its kind and the fixtures that it names."""
    given = {} if kind is None else {"kind": kind}
    check(**given, **{name: request.getfixturevalue(name) for name in inspect.signature(check).parameters if name not in given})


def found(where: str) -> Any:
    """Return what a member's name stands for."""
    package, _, names = where.rpartition(":")
    value: Any = importlib.import_module(package or "peft_core")
    for part in names.split("."):
        value = getattr(value, part)
    return value


def has_the_arguments(row: Row) -> None:
    """Check that a row's member has a docstring, and the row's arguments in their order with their defaults."""
    assert row.where is not None
    target = found(row.where)
    assert inspect.getdoc(target), f"{row.where} has no docstring"
    parameters = inspect.signature(target).parameters.values()
    expected = [text for text in re.split(r", (?![^\[(]*[\])])", row.arguments or "") if text]
    by_keyword = expected[expected.index("*") + 1 :] if "*" in expected else []
    expected = expected[: expected.index("*")] if "*" in expected else expected
    positional = [p for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]
    shown = [_shown(p, text) for p, text in itertools.zip_longest(positional, expected) if p is not None]
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    assert shown == expected[: len(shown)], f"{row.where} has {shown}, not {expected}"
    assert len(shown) == len(expected) or takes_more, f"{row.where} lacks {expected[len(shown) :]}"
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for text in by_keyword:
        shown_one = _shown(own[text.partition("=")[0]], text)
        assert shown_one == text, f"{row.where} has {shown_one}, not {text}"


def _shown(parameter: inspect.Parameter, text: str | None) -> str:
    has_default = parameter.default is not parameter.empty and (text is None or "=" in text)
    return f"{parameter.name}={parameter.default!r}" if has_default else parameter.name


def idle(rows: Iterable[Row], folder: Path) -> set[str]:
    """Return the functions of a folder's modules ``rows*.py`` that check no row."""
    used = {check for row in rows for check in row.checks}
    left = set()
    for file in sorted(folder.glob("rows*.py")):
        module = importlib.import_module(f"{folder.name}.{file.stem}")
        own = {value for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"}
        left |= {f"{file.stem}.{check.__name__}" for check in own - used}
    return left


def stand_in_order(rows: Iterable[Row]) -> None:
    """Check that rows stand in the order of the page, each once."""
    rows = list(rows)
    places = [tuple(map(int, row.section.split("."))) for row in rows]
    assert places == sorted(places), places
    names = [(row.section, row.name) for row in rows]
    assert len(names) == len(set(names)), "a row is there twice"

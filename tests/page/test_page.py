"""Every row of the page holds: the arguments of its member, and each thing that it says (`page/table.py`)."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page.table import Row, page

ROWS = page()
#: functions of row modules that return checks
MAKERS = {
    "rows_layers.scales_of",
    "rows_names.importable",
    "rows_prompts.backbone_runs_behind_the_prefix",
    "rows_prompts.dimensions_are_read_from",
    "rows_tasks.class_follows_the_task",
    "rows_tasks.losses_are_those_by_hand",
    "rows_tasks.outputs_are_those_by_hand",
}
MEMBERS = [row for row in ROWS if row.where is not None]


def cases() -> list[Any]:
    """Return (check, kind of adapter or None) for each check of each row, with the row's section and name as id."""
    found = []
    for row in ROWS:
        for check in row.checks:
            for kind in getattr(check, "kinds", (None,)):
                found.append(pytest.param(check, kind, id=f"{row.section} {row.name}-{check.__name__}{f'-{kind}' if kind else ''}"))
    return found


@pytest.mark.parametrize(("check", "kind"), cases())
def test_row(check: Callable[..., None], kind: str | None, request: pytest.FixtureRequest) -> None:
    given = {} if kind is None else {"kind": kind}
    check(**given, **{name: request.getfixturevalue(name) for name in inspect.signature(check).parameters if name not in given})


def found(where: str) -> Any:
    """Return what a member's name stands for."""
    package, _, names = where.rpartition(":")
    value: Any = importlib.import_module(package or "peft_core")
    for part in names.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("row", MEMBERS, ids=[f"{row.section} {row.name}" for row in MEMBERS])
def test_arguments(row: Row) -> None:
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
    assert shown == expected[: len(shown)]
    assert len(shown) == len(expected) or takes_more, f"{row.where} lacks {expected[len(shown) :]}"
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for text in by_keyword:
        assert _shown(own[text.partition("=")[0]], text) == text


def _shown(parameter: inspect.Parameter, text: str | None) -> str:
    has_default = parameter.default is not parameter.empty and (text is None or "=" in text)
    return f"{parameter.name}={parameter.default!r}" if has_default else parameter.name


def test_no_row_lacks_a_check() -> None:
    assert [f"{row.section} {row.name}" for row in ROWS if not row.checks] == []


def test_rows_stand_in_the_order_of_the_page() -> None:
    places = [tuple(map(int, row.section.split("."))) for row in ROWS]
    assert places == sorted(places)
    assert {place[0] for place in places} == {1, 2, 3, 4, 5, 6, 7, 9, 12}
    names = [(row.section, row.name) for row in ROWS]
    assert len(names) == len(set(names)), "a row is there twice"


def test_every_check_stands_in_the_table() -> None:
    used = {check for row in ROWS for check in row.checks}
    idle = set()
    for file in sorted(Path(__file__).parent.glob("rows_*.py")):
        module = importlib.import_module(f"page.{file.stem}")
        own = {value for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"}
        idle |= {f"{file.stem}.{check.__name__}" for check in own - used}
    assert idle - MAKERS == set()

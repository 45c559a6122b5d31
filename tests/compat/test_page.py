"""Every row of the page about what is in `peft` alone holds (`compat/table.py`); the others: `tests/page`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compat.table import ROWS
from page import checking
from page.table import Row

MEMBERS = [row for row in ROWS if row.where is not None]


@pytest.mark.parametrize(("check", "kind"), checking.cases(ROWS))
def test_row(check: Callable[..., None], kind: str | None, request: pytest.FixtureRequest) -> None:
    checking.call(check, kind, request)


@pytest.mark.parametrize("row", MEMBERS, ids=[f"{row.section} {row.name}" for row in MEMBERS])
def test_arguments(row: Row) -> None:
    checking.has_the_arguments(row)


def test_no_row_lacks_a_check() -> None:
    assert [f"{row.section} {row.name}" for row in ROWS if not row.checks] == []


def test_rows_stand_in_the_order_of_the_page() -> None:
    checking.stand_in_order(ROWS)


def test_every_check_stands_in_the_table() -> None:
    assert checking.idle(ROWS, Path(__file__).parent) == {"rows.importable"}

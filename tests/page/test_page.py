"""Every row of the page holds: the arguments of its member, and each thing that it says (`page/table.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from page import checking
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
    assert {int(row.section.split(".")[0]) for row in ROWS} == {1, 2, 3, 4, 5, 6, 7, 9, 12}


def test_every_check_stands_in_the_table() -> None:
    assert checking.idle(ROWS, Path(__file__).parent) - MAKERS == set()

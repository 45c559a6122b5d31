"""The page, row by row: sections 1 to 7, 9 and 12 of the API's specification, in their order, and what checks each row.

A row is a member with its arguments (`x` has no default, `x=1` has this one; keyword-only arguments of ours may follow and are not listed),
or what the page says of a situation. Where ours differs on purpose, the row says so in `differs`, and its checks hold what is documented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of the page.

    Args:
        section: number of the section.
        name: what the row is about.
        checks: what the row says, as functions.
        where: the name in `peft_core` (or `package:name`) that has the arguments.
        arguments: its arguments in their order with their defaults; None: not stated.
        differs: how ours differs on purpose, and where that is documented.
    """

    section: str
    name: str
    checks: tuple[Callable[..., None], ...] = ()
    where: str | None = None
    arguments: str | None = None
    differs: str = ""


def member(section: str, where: str, arguments: str, *checks: Callable[..., None], differs: str = "") -> Row:
    """Return the row of a member with its arguments."""
    return Row(section, where.rpartition(":")[2], checks, where, arguments, differs)


def says(section: str, name: str, *checks: Callable[..., None], differs: str = "") -> Row:
    """Return the row of a situation."""
    return Row(section, name, checks, differs=differs)


def page() -> list[Row]:
    """Return all rows in the order of the page."""
    from page import table_functions, table_models, table_rest, table_tasks

    return [*table_models.ROWS, *table_tasks.ROWS, *table_functions.ROWS, *table_rest.ROWS]

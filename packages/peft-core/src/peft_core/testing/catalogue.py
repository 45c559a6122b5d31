"""The checks as a table for the documentation, made from their docstrings."""

from __future__ import annotations

from .conditions import explained
from .suite import TunerSuite


def markdown(suite: type[TunerSuite] = TunerSuite) -> str:
    """Return a Markdown table: each check, what it tests, and what it protects users from."""
    rows = ["| check | tests | protects from |", "|---|---|---|"]
    for check in suite.checks():
        tests, harm = (text.replace("|", "\\|") for text in explained(getattr(suite, check)))
        rows.append(f"| `{check}` | {tests} | {harm} |")
    return "\n".join(rows) + "\n"

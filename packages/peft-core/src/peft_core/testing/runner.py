"""Running a suite without pytest: for tools, and for the tests of the suite itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .suite import TunerSuite


@dataclass(frozen=True)
class Result:
    """The outcome of one check on one config; `error` is None if it passed."""

    check: str
    config: str
    error: BaseException | None

    @property
    def passed(self) -> bool:
        """Whether the check passed."""
        return self.error is None


def run_suite(suite: type[TunerSuite], checks: Iterable[str] | None = None) -> list[Result]:
    """Run the checks of a suite on each of its configs.

    Args:
        suite: the author's subclass.
        checks: names of checks (``"test_merge"``); None: all.
    """
    results = []
    for check in suite.checks() if checks is None else checks:
        for name in suite.configs:
            try:
                getattr(suite(), check)(name)
            except Exception as error:
                results.append(Result(check, name, error))
            else:
                results.append(Result(check, name, None))
    return results

"""Running a suite without pytest: for tools, and for the tests of the suite itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .conditions import NotApplicable

if TYPE_CHECKING:
    from .suite import TunerSuite


@dataclass(frozen=True)
class Result:
    """The outcome of one check on one config.

    Args:
        check: name of the check.
        config: name of the config.
        error: what it raised; None if it passed or was not run.
        reason: why it was not run, because it does not apply to this config; None if it was.
    """

    check: str
    config: str
    error: BaseException | None = None
    reason: str | None = None

    @property
    def outcome(self) -> str:
        """``"passed"``, ``"failed"`` or ``"not run"``."""
        if self.reason is not None:
            return "not run"
        return "passed" if self.error is None else "failed"

    @property
    def passed(self) -> bool:
        """Whether the check ran and passed."""
        return self.outcome == "passed"


def run_suite(suite: type[TunerSuite], checks: Iterable[str] | None = None) -> list[Result]:
    """Run the checks of a suite on each of its configs.

    Args:
        suite: the author's subclass.
        checks: names of checks (``"test_merge"``); None: all.

    Raises:
        UnknownTunerError: the suite's tuner is not installed.
    """
    return [_run(suite, check, name) for check in (suite.checks() if checks is None else checks) for name in suite.named_configs()]


def _run(suite: type[TunerSuite], check: str, name: str) -> Result:
    try:
        getattr(suite(), check)(name)
    except NotApplicable as reason:
        return Result(check, name, reason=str(reason))
    except Exception as error:
        return Result(check, name, error)
    return Result(check, name)

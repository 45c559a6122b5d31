"""Runs a conformance suite without pytest: for tools, and for the tests of the suite itself."""

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
        check: the name of the check.
        config: the name of the config.
        error: the exception that the check raised; None if the check passed or was not run.
        reason: the reason why the check does not apply to this config and was not run; None if it was run.
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
    """Run the checks of a suite on each of its configs, and return one `Result` for each check and config.

    Args:
        suite: the author's subclass of `TunerSuite`.
        checks: the names of the checks to run (``"test_merge"``); None: all checks.

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

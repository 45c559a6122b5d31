"""The conformance report: what was found, as `conformance.json`, and as `conformance.html` without any other file. Imports no torch."""

from __future__ import annotations

import json
import platform
from typing import Any

import importlib_metadata
import pytest

from .. import __version__
from .html import page


class Reporter:
    """Gathers the results of all suites of a run, and writes the report at its end.

    Args:
        config: of the run; its option `peft_report` is the folder, relative to where pytest was started.
        key: the attribute of a test's report that says which check of which suite it is.
    """

    def __init__(self, config: pytest.Config, key: str) -> None:
        self.folder = config.invocation_params.dir / str(config.getoption("peft_report"))
        self.key = key
        self.suites: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of one phase of a check."""
        facts: dict[str, Any] | None = getattr(report, self.key, None)
        if facts is None:
            return
        suite = facts["suite"]
        if "tuner" in facts:
            self.suites[suite] = facts
        cells = self.results.setdefault(suite, {})
        cell = cells.setdefault((facts["check"], facts["config"]), {"outcome": "passed", "reason": "", "seconds": 0.0})
        cell["seconds"] = round(cell["seconds"] + report.duration, 4)
        outcome, reason = _outcome(report)
        if outcome != "passed":
            cell.update(outcome=outcome, reason=reason)

    def pytest_sessionfinish(self) -> None:
        """Write both files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.report()
        (self.folder / "conformance.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.folder / "conformance.html").write_text(page(found), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where it is."""
        terminalreporter.write_line(f"conformance report: {self.folder / 'conformance.html'}")

    def report(self) -> dict[str, Any]:
        """Return the report as it is written to JSON."""
        suites = [self._suite(name, facts) for name, facts in sorted(self.suites.items())]
        return {"format": 1, "versions": versions(), "suites": suites}

    def _suite(self, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        results = []
        for check in facts["checks"]:
            for config in facts["configs"]:
                cell = self.results[name].get((check, config))
                if cell is None:
                    reason = facts["not_run"].get(check, {}).get(config, "not selected in this run")
                    cell = {"outcome": "not run", "reason": reason, "seconds": 0.0}
                results.append({"check": check, "config": config, **cell})
        counts = {outcome: sum(result["outcome"] == outcome for result in results) for outcome in OUTCOMES}
        checks = [{"check": check, "tests": what, "protects_from": harm} for check, (what, harm) in facts["checks"].items()]
        return {
            "suite": name,
            "tuner": facts["tuner"],
            "counts": counts,
            "seconds": round(sum(result["seconds"] for result in results), 2),
            "configs": facts["configs"],
            "checks": checks,
            "results": results,
        }


#: every outcome that a report can name
OUTCOMES = ("passed", "failed", "expected failure", "not run")


def _outcome(report: pytest.TestReport) -> tuple[str, str]:
    if report.passed:
        return "passed", ""
    if report.skipped:
        if hasattr(report, "wasxfail"):
            return "expected failure", str(report.wasxfail)
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        return "not run", str(reason).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return "failed", str(getattr(crash, "message", report.longreprtext))


def versions() -> dict[str, str]:
    """Return the versions of Python, core and what both stand on; from metadata, so that nothing heavy is imported."""
    found = {"python": platform.python_version(), "peft-core": __version__}
    for name in ("torch", "transformers", "pytest", "hypothesis"):
        try:
            found[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

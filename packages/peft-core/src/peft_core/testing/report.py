"""Writes the conformance report: the results as `conformance.json`, and as the self-contained page `conformance.html`. Imports no torch."""

from __future__ import annotations

import json
import platform
from typing import Any

import importlib_metadata
import pytest

from .. import __version__
from .html import page


class Reporter:
    """Collects the results of all suites of a pytest run, and writes the conformance report at the end of the run.

    Args:
        config: the pytest config of the run; its option `peft_report` is the output folder, relative to the folder in which pytest was started.
        key: the attribute of a `pytest.TestReport` that names the suite, the check and the config of the test.
    """

    def __init__(self, config: pytest.Config, key: str) -> None:
        self.folder = config.invocation_params.dir / str(config.getoption("peft_report"))
        self.key = key
        self.suites: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of one phase (setup, call or teardown) of a check."""
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
        """Write `conformance.json` and `conformance.html`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.report()
        (self.folder / "conformance.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.folder / "conformance.html").write_text(page(found), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the path of `conformance.html`."""
        terminalreporter.write_line(f"conformance report: {self.folder / 'conformance.html'}")

    def report(self) -> dict[str, Any]:
        """Return the report as the dict that is written to `conformance.json`."""
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


#: all possible outcomes of a check in the report
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
    """Return the versions of Python, peft-core, torch, transformers, pytest and hypothesis, read from package metadata without importing them."""
    found = {"python": platform.python_version(), "peft-core": __version__}
    for name in ("torch", "transformers", "pytest", "hypothesis"):
        try:
            found[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

"""The pytest plugin with the options `--peft-tuner`, `--peft-config` and `--peft-report`.

pytest imports this module at each start, so torch and other parts of peft-core are imported only inside the functions that need them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

#: the module that is collected for `--peft-tuner`; it holds no tests of its own
SUITES = Path(__file__).with_name("installed.py")
#: attribute of a `pytest.TestReport` that holds the data for the conformance report; pytest-xdist sends it from the worker to the controller
REPORT_ATTRIBUTE = "peft_conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("peft-core", "conformance of tuners (peft-core)")
    group.addoption(
        "--peft-tuner",
        action="append",
        default=[],
        metavar="TYPE",
        help="run the conformance suite on this installed tuner, without a test file; may be repeated; `all`: every installed one",
    )
    group.addoption("--peft-config", metavar="FILE", help="JSON, name → fields: the configs to run instead of the tuner's examples")
    group.addoption("--peft-report", metavar="DIR", help="write conformance.json and conformance.html about all suites of this run into this folder")


# ---- tuners without a test file ------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Register the conformance report, resolve the tuners of `--peft-tuner`, and add their suites to what pytest collects."""
    if config.getoption("peft_report") and not hasattr(config, "workerinput"):  # only in the controller of pytest-xdist
        from .report import Reporter

        config.pluginmanager.register(Reporter(config, REPORT_ATTRIBUTE), "peft_conformance_report")
    if not config.getoption("peft_tuner"):
        if config.getoption("peft_config"):
            raise pytest.UsageError("--peft-config says how to run a tuner; name it with --peft-tuner TYPE")
        return
    types = _resolve_types(config.getoption("peft_tuner"))
    if config.getoption("peft_config") and len(types) != 1:
        raise pytest.UsageError(f"--peft-config holds the configs of one tuner, and {len(types)} are to run: {', '.join(types)}")
    config.stash[_TYPES] = types
    config.stash[_CONFIGS] = _read_configs(config)
    # collect the suites besides the paths on the command line; without such paths pytest would collect the whole working directory, which is
    # not what was asked for
    given = list(config.args) if config.args_source is pytest.Config.ArgsSource.ARGS else []
    config.args[:] = given if str(SUITES) in given else [*given, str(SUITES)]


_TYPES = pytest.StashKey[list[str]]()
_CONFIGS = pytest.StashKey["dict[str, dict[str, Any]] | None"]()


def _resolve_types(given: Iterable[str]) -> list[str]:
    """Return the `peft_type` of each tuner named on the command line, each once; `all` stands for every installed tuner."""
    from ..errors import PeftError
    from ..plugins import registry

    found: dict[str, None] = {}
    for text in given:
        names = sorted(registry.claims()) if text.casefold() == "all" else [text]
        if not names:
            raise pytest.UsageError("--peft-tuner all: no tuner is installed")
        for name in names:
            try:
                found[registry.resolve(name).peft_type] = None
            except PeftError as error:
                raise pytest.UsageError(f"--peft-tuner {text}: {error}") from error
    return list(found)


def _read_configs(config: pytest.Config) -> dict[str, dict[str, Any]] | None:
    """Return the adapter configs (name → fields) in the file of `--peft-config`; None without the option."""
    given = config.getoption("peft_config")
    if given is None:
        return None
    path = config.invocation_params.dir / given
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--peft-config {given}: can't be read as JSON: {error}") from error
    if not isinstance(found, dict) or not found or not all(isinstance(fields, dict) for fields in found.values()):
        raise pytest.UsageError(f'--peft-config {given}: expected one object, name → fields, such as {{"small": {{"target_modules": ["q_proj"]}}}}')
    return found


class InstalledSuites(pytest.Module):
    """The suites of the tuners that were named on the command line."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Put one suite class for each tuner into the module `installed`, and collect them as pytest collects any test class."""
        from .installed import suite_for

        suites = [suite_for(peft_type, self.config.stash[_CONFIGS]) for peft_type in self.config.stash[_TYPES]]
        for suite in suites:
            setattr(self.obj, suite.__name__, suite)
        wanted = {suite.__name__ for suite in suites}  # an earlier pytest run in this process may have left its suites in the module
        return [found for found in super().collect() if found.name in wanted]


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect `SUITES` as an `InstalledSuites`, if tuners were named on the command line."""
    if module_path != SUITES or _TYPES not in parent.config.stash:
        return None
    module: pytest.Module = InstalledSuites.from_parent(parent, path=module_path, name="peft-core", nodeid="peft-core")
    return module


# ---- suites, from test files too ------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> list[pytest.Item | pytest.Collector] | None:
    """Collect no item for a check that applies to none of the suite's configs, so that it does not appear as skipped."""
    suite = _suite(collector.obj) if isinstance(collector, pytest.Class) else None
    if suite is None or not hasattr(obj, "condition"):
        return None
    instance = suite()
    return [] if all(instance.not_run(name, config) is not None for config in suite.named_configs()) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the data for the conformance report to the `TestReport` of a check: under pytest-xdist another process writes the conformance report."""
    report = yield
    if item.config.getoption("peft_report") and isinstance(item, pytest.Function):
        suite, call = _suite(item.cls), getattr(item, "callspec", None)
        if suite is not None and call is not None and "name" in call.params:
            from .facts import facts_of

            location = {"suite": f"{suite.__module__}.{suite.__qualname__}", "check": item.function.__name__, "config": call.params["name"]}
            setattr(report, REPORT_ATTRIBUTE, {**location, **(facts_of(suite) if report.when == "setup" else {})})
    return report


def _suite(cls: Any) -> Any | None:
    """Return `cls` if it is a conformance suite, a subclass of `SuiteBase`; otherwise None."""
    base = sys.modules.get(f"{__package__}.base")  # if the module is not imported yet, no subclass can exist
    return cls if base is not None and isinstance(cls, type) and issubclass(cls, base.SuiteBase) else None

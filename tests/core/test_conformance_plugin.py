"""The pytest plugin of the conformance suite: tuners without a test file, reports, and pytest that starts as fast as before."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import peft_core
import support
from peft_core.errors import ConfigError
from peft_core.testing import TunerSuite, run_suite, suite_for
from peft_core.testing.catalogue import markdown
from peft_core.testing.conditions import explained

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("-p", "no:cacheprovider")
CHECKS = ("test_status", "test_generate", "test_shapes", "test_padding")


@pytest.fixture(scope="module", autouse=True)
def models_are_imported() -> None:
    """pytester takes new modules out again, and torch can't be imported twice: have everything imported that suites need."""
    configs: dict[str, dict[str, Any]] = {"decoder": {"target_modules": ["q_proj"]}, "head": {"target_modules": ["query"], "base": "bert-seq-cls"}}
    with support.registered(support.DENSE):
        found = run_suite(suite_for("DENSE", configs), CHECKS)
    assert {result.outcome for result in found} == {"passed", "not run"}


# ---- starting pytest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heavy", ["torch", "transformers", "pytest", "hypothesis", "peft_core.testing.suite"])
def test_the_room_is_lazy(heavy: str) -> None:
    assert support.run_python(f"import peft_core.testing, sys; dir(peft_core.testing); print({heavy!r} in sys.modules)") == "False"


@pytest.mark.parametrize("name", peft_core.testing.__all__)
def test_every_name_of_the_room_is_there(name: str) -> None:
    assert getattr(peft_core.testing, name) is not None
    assert name in dir(peft_core.testing)


def test_an_unknown_name_of_the_room_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="TunerSweet"):
        _ = peft_core.testing.TunerSweet


def test_pytest_starts_without_torch(tmp_path: Path) -> None:
    """The plugin is loaded, and nothing heavy with it, nor anything else of core that is not needed."""
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('peft_conformance')\n"
        "    assert not {'torch', 'transformers', 'peft_core.plugins', 'peft_core.testing.report', 'peft_core.testing.base'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout


# ---- without a test file, in a process of its own --------------------------------------------------------------------------

PLUGIN = """
from peft_core.plugins import Capability, TunerSpec

def peft_tuners():
    examples = {"first": {"target_modules": ["q_proj"]}, "second": {"target_modules": ["v_proj"], "alpha": 2}}
    caps = Capability.MERGE | Capability.PER_SAMPLE
    yield TunerSpec("ZIP", "peft_zip_tuner:ZipConfig", "peft_zip_tuner:ZipTuner", "zip_", capabilities=caps, examples=examples)
"""
TUNER = """
from dataclasses import dataclass
from peft_core import AdapterLayer, LayerConfig, LayerTuner

@dataclass
class ZipConfig(LayerConfig):
    alpha: float = 1.0
    default_peft_type = "ZIP"

class ZipLayer(AdapterLayer):
    containers = ("zip_delta",)
    def add(self, adapter, config):
        self.new("zip_delta", adapter, self.matrix_shape)
        self.scaling[adapter] = config.alpha
    def delta_weight(self, adapter):
        return self.scaling[adapter] * self.zip_delta[adapter]

class ZipTuner(LayerTuner):
    layers = (ZipLayer,)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on the path in which the tuner ZIP is installed, and an empty one beside it."""
    folder = tmp_path / "site"
    support.distribution(folder, "peft-zip", tuners={"zip": "peft_zip_plugin"}, modules={"peft_zip_plugin": PLUGIN, "peft_zip_tuner": TUNER})
    (tmp_path / "empty").mkdir()
    return folder


def run_pytest(folder: Path, *options: str, site: Path | None = None, only: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site or ""), "PEFT_CORE_PLUGINS": only}
    env = {key: value for key, value in env.items() if value and not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def results(folder: Path) -> dict[tuple[str, str], str]:
    (suite,) = json.loads((folder / "conformance.json").read_text(encoding="utf-8"))["suites"]
    return {(result["check"], result["config"]): result["outcome"] for result in suite["results"]}


def test_an_installed_tuner_needs_no_test_file_and_xdist_changes_nothing(site: Path) -> None:
    """From an empty folder; every check that applies passes, none is skipped; two workers find the same."""
    empty = site.parent / "empty"
    one = run_pytest(empty, "--peft-tuner", "zip", "--peft-report", "one", "-rs", site=site)
    assert one.returncode == 0, one.stdout + one.stderr
    found = results(empty / "one")
    passed = [cell for cell, outcome in found.items() if outcome == "passed"]
    assert f"{len(passed)} passed" in one.stdout
    assert "skipped" not in one.stdout
    assert {check for (check, _), outcome in found.items() if outcome != "passed"} == {"test_padding"}
    assert {config for _, config in found} == {"first", "second"}
    two = run_pytest(empty, "--peft-tuner", "ZIP", "--peft-report", "two", "-n", "2", site=site)
    assert two.returncode == 0, two.stdout + two.stderr
    assert results(empty / "two") == found
    assert {path.name for path in empty.iterdir()} <= {"one", "two", ".hypothesis"}
    report = json.loads((empty / "two" / "conformance.json").read_text(encoding="utf-8"))
    assert report["versions"].keys() == {"python", "peft-core", "torch", "transformers", "pytest", "hypothesis"}
    tuner = {"peft_type": "ZIP", "distribution": "peft-zip", "version": "1.0", "capabilities": ["MERGE", "PER_SAMPLE"]}
    assert report["suites"][0]["tuner"] == tuner
    assert report["suites"][0]["seconds"] > 0


def test_all_is_every_installed_tuner(site: Path) -> None:
    modules = {f"peft_zap_{part}": text.replace("ZIP", "ZAP").replace("_zip_", "_zap_") for part, text in (("plugin", PLUGIN), ("tuner", TUNER))}
    support.distribution(site, "peft-zap", tuners={"zap": "peft_zap_plugin"}, modules=modules)
    done = run_pytest(site.parent / "empty", "--peft-tuner", "all", "--collect-only", "-q", "-k", "test_status", site=site, only="peft-zip,peft-zap")
    assert re.findall(r"::Test_(\w+)::test_status\[(\w+)\]", done.stdout) == [
        (name, config) for name in ("ZAP", "ZIP") for config in ("first", "second")
    ], done.stdout + done.stderr


def test_a_config_that_is_refused_fails_its_own_checks_alone(pytester: pytest.Pytester) -> None:
    pytester.makefile(".json", mine='{"good": {"target_modules": ["q_proj"]}, "bad": {"target_modules": 3}}')
    result = pytester.runpytest_inprocess("--peft-tuner", "dense", "--peft-config", "mine.json", "-k", "test_status or test_generate", *PLAIN)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["*ConfigError: target_modules=3 is a int*"])


def test_a_broken_plugin_is_a_usage_error(site: Path) -> None:
    (site / "peft_zip_plugin.py").write_text("import no_such_module\n")
    done = run_pytest(site.parent / "empty", "--peft-tuner", "zip", site=site)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "the plugin peft-zip 1.0 (module peft_zip_plugin) can't be imported" in done.stderr


# ---- options -------------------------------------------------------------------------------------------------------------


def test_an_unknown_tuner_is_a_usage_error_with_the_nearest(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--peft-tuner", "dens")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--peft-tuner dens: no tuner is installed for peft_type='dens'*did you mean 'DENSE'?*"])


def test_tuners_can_be_named_again_and_in_any_case(pytester: pytest.Pytester) -> None:
    found = collected(pytester, "--peft-tuner", "dense", "--peft-tuner", "Cue", "--peft-tuner", "DENSE")
    assert {name.split("::")[1] for name in found} == {"Test_DENSE", "Test_CUE"}
    assert len(found) == len(set(found))


def test_tests_of_the_folder_run_only_if_named(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile("def test_own():\n    pass\n")
    assert not [name for name in collected(pytester, "--peft-tuner", "dense") if "test_own" in name]
    both = collected(pytester, "--peft-tuner", "dense", str(path))
    assert [name for name in both if "test_own" in name]
    assert [name for name in both if "Test_DENSE" in name]
    assert len(collected(pytester)) == 1, "without --peft-tuner nothing of ours is collected"


def test_a_projects_own_naming_of_tests_changes_nothing(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\npython_classes = Check*\npython_files = check_*.py\n")
    assert collected(pytester, "--peft-tuner", "dense")


def test_checks_that_apply_to_no_config_are_not_collected(pytester: pytest.Pytester) -> None:
    checks = {name.partition("[")[0].rpartition("::")[2] for name in collected(pytester, "--peft-tuner", "dense")}
    assert set(TunerSuite.checks()) - checks == {"test_padding"}


def test_a_file_of_configs_takes_the_place_of_the_examples(pytester: pytest.Pytester) -> None:
    pytester.makefile(".json", mine='{"small": {"target_modules": ["q_proj"]}, "head": {"target_modules": ["query"], "base": "bert-seq-cls"}}')
    result = pytester.runpytest_inprocess("--peft-tuner", "dense", "--peft-config", "mine.json", "-k", "test_status or test_generate", *PLAIN)
    result.assert_outcomes(passed=3)  # a classifier does not generate


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{}", ["--peft-tuner", "dense"], "expected one object, name → fields"),
        ('{"a": 1}', ["--peft-tuner", "dense"], "expected one object, name → fields"),
        ("{", ["--peft-tuner", "dense"], "can't be read as JSON"),
        ('{"a": {}}', ["--peft-tuner", "dense", "--peft-tuner", "cue"], "configs of one tuner, and 2 are to run: DENSE, CUE"),
        ('{"a": {}}', [], "name it with --peft-tuner TYPE"),
    ],
)
def test_a_bad_file_of_configs_is_a_usage_error(pytester: pytest.Pytester, text: str, options: list[str], message: str) -> None:
    pytester.makefile(".json", mine=text)
    result = pytester.runpytest_inprocess("--peft-config", "mine.json", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message}*"])


def collected(pytester: pytest.Pytester, *options: str) -> list[str]:
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:cacheprovider", *options)
    assert result.ret in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), result.stdout.str()
    return [line for line in result.outlines if "::" in line]


# ---- suites in files, and their reports ------------------------------------------------------------------------------------

SUITES = """
    from peft_core.testing import NotApplicable, TunerSuite

    class TestDense(TunerSuite):
        peft_type = "DENSE"
        configs = {"a<b": {"target_modules": ["q_proj"]}, "head": {"target_modules": ["query"], "base": "bert-seq-cls"}}
        expected_failures = {"test_known": "known & <expected>"}

        def test_known(self, name):
            '''A fault.'''
            assert False

        def test_wrong(self, name):
            '''Of this file.

            Protects from <script> & worse.
            '''
            assert name == "head", "wrong <b>here</b>"

        def test_late(self, name):
            '''Shows while it runs.'''
            raise NotApplicable("only seen late")
"""


def test_a_report_says_what_became_of_each_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITES)
    selected = "test_known or test_wrong or test_late or test_status or test_generate or test_padding"
    result = pytester.runpytest_inprocess("--peft-report", "out", "-k", selected, "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, failed=1, xfailed=2, skipped=2)
    result.stdout.fnmatch_lines(["conformance report: *conformance.html", "*SKIPPED*only seen late"])
    report = json.loads((pytester.path / "out" / "conformance.json").read_text(encoding="utf-8"))
    (suite,) = report["suites"]
    cells = {(cell["check"], cell["config"]): (cell["outcome"], cell["reason"]) for cell in suite["results"]}
    assert cells["test_status", "head"] == ("passed", "")
    assert cells["test_known", "head"] == ("expected failure", "known & <expected>")
    assert cells["test_wrong", "head"] == ("passed", "")
    outcome, reason = cells["test_wrong", "a<b"]
    assert outcome == "failed"
    assert "wrong <b>here</b>" in reason
    assert cells["test_late", "head"] == ("not run", "only seen late")
    assert cells["test_generate", "head"] == ("not run", "the task SEQ_CLS does not generate")
    assert cells["test_padding", "head"] == ("not run", "DENSE has no virtual tokens")
    assert cells["test_merge", "head"] == ("not run", "not selected in this run")
    assert sum(suite["counts"].values()) == len(cells) == 2 * len(suite["checks"])
    assert suite["tuner"]["capabilities"] == ["MERGE", "PER_SAMPLE", "EMBEDDING"]
    assert {"check": "test_wrong", "tests": "Of this file.", "protects_from": "<script> & worse."} in suite["checks"]


class _Page(HTMLParser):
    """Collects the tags, attributes and cells of a page, and sees that all are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))


def test_the_page_needs_nothing_else_and_lets_nothing_through(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITES)
    pytester.runpytest_inprocess("--peft-report", "out", "-k", "test_known or test_wrong or test_late or test_status", "-p", "no:cacheprovider")
    text = (pytester.path / "out" / "conformance.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "b", "iframe"} & page.tags
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert {("th", "a<b"), ("td", "pass"), ("td", "fail"), ("td", "expected failure"), ("td", "not run")} <= set(page.texts)
    assert ("small", "Protects from <script> & worse.") in page.texts
    assert any(tag == "pre" and "wrong <b>here</b>" in found for tag, found in page.texts)


def test_no_suite_no_results(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_own():\n    pass\n")
    pytester.runpytest_inprocess("--peft-report", "out").assert_outcomes(passed=1)
    assert json.loads((pytester.path / "out" / "conformance.json").read_text(encoding="utf-8"))["suites"] == []
    assert "No check" in (pytester.path / "out" / "conformance.html").read_text(encoding="utf-8")


def test_without_the_option_nothing_is_written(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITES)
    pytester.runpytest_inprocess("-k", "test_status", "-p", "no:cacheprovider").assert_outcomes(passed=2)
    assert not list(pytester.path.rglob("conformance.*"))


def test_an_expected_failure_that_is_no_check_is_refused_with_the_nearest(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITES.replace('"test_known":', '"test_knwon":'))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["*expected_failures names 'test_knwon', which is no check; did you mean 'test_known'*"])
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_a_tuner_that_a_fixture_registers_can_be_tested(pytester: pytest.Pytester) -> None:
    """It is not known when tests are collected: what does not apply then shows while it runs."""
    pytester.makepyfile(
        """
        import pytest, support
        from dataclasses import replace
        from peft_core.testing import TunerSuite, run_suite, suite_for

        class LateConfig(support.DenseConfig):
            default_peft_type = "LATE"

        @pytest.fixture(autouse=True)
        def late():
            with support.registered(replace(support.DENSE, peft_type="LATE", config=LateConfig)):
                yield

        class TestLate(TunerSuite):
            peft_type = "LATE"
            configs = {"a": {"target_modules": ["q_proj"]}}
        """
    )
    result = pytester.runpytest_inprocess("-k", "test_status or test_padding", "--peft-report", "out", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=1)
    (suite,) = json.loads((pytester.path / "out" / "conformance.json").read_text(encoding="utf-8"))["suites"]
    assert suite["tuner"]["capabilities"] == ["MERGE", "PER_SAMPLE", "EMBEDDING"]


# ---- what the checks say of themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", TunerSuite.checks())
def test_every_check_says_what_it_protects_from(check: str) -> None:
    tests, harm = explained(getattr(TunerSuite, check))
    assert tests.endswith(".")
    assert harm.endswith(".")


def test_no_check_ends_early_without_saying_so() -> None:
    """A bare `return` in a check is a pass that tested nothing, unless what is refused was tested right before it."""
    silent = []
    for path in sorted((ROOT / "packages/peft-core/src/peft_core/testing").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                silent += [f"{path.name}:{found.lineno}" for found in ast.walk(node) if isinstance(found, ast.If) and _silent(found)]
    assert silent == []


def _silent(node: ast.If) -> bool:
    return isinstance(node.body[0], ast.Return)


def test_the_page_of_the_docs_lists_every_check() -> None:
    """What `peft_core.testing.catalogue.markdown` returns is in docs/conformance.md, to the letter."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert markdown() in text, f"put this table into docs/conformance.md:\n\n{markdown()}"
    assert text.count("| `test_") == len(TunerSuite.checks())


def test_every_option_is_in_the_page_of_the_docs() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    source = (ROOT / "packages/peft-core/src/peft_core/testing/plugin.py").read_text(encoding="utf-8")
    options = set(re.findall(r'addoption\(\s*"(--[\w-]+)"', source))
    assert options == {"--peft-tuner", "--peft-config", "--peft-report"}
    assert all(f"`{option} " in text for option in options)


def test_drawn_shapes_say_what_is_missing_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_core.testing.shapes import strategies

    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'peft-core[testing]'")):
        strategies()

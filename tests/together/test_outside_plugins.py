"""The packages under examples/plugins are a stranger's: their own tests pass beside ours, and they import only what is public."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import distribution, run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
PACKAGES = ("peft-audit-log", "peft-ia3", "peft-vera")
FOLDERS = {name: ROOT / "examples" / "plugins" / name for name in PACKAGES}
#: the rooms of peft_core that the docs name for authors
PUBLIC = ("peft_core", "peft_core.config", "peft_core.plugins", "peft_core.testing")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An import path on which the three packages look installed."""
    folder = tmp_path_factory.mktemp("outside")
    for name, package in FOLDERS.items():
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        points = project["entry-points"]
        distribution(
            folder,
            name,
            tuners=points.get("peft_core.tuners"),  # the stand-ins that it writes have dots in their names: what is imported is in src
            plugins=points.get("peft_core.plugins"),
            requires=tuple(project["dependencies"]),
            version=project["version"],
        )
    return os.pathsep.join([str(folder), *(str(package / "src") for package in FOLDERS.values())])


@pytest.mark.parametrize("package", PACKAGES)
def test_its_own_tests_pass(package: str, installed: str) -> None:
    path = os.pathsep.join(part for part in (installed, os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests"],
        cwd=FOLDERS[package],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


def test_discovered_like_any_other(installed: str, tmp_path: Path) -> None:
    code = """
        import json, os, sys
        os.chdir(os.environ["FOLDER"])
        from peft_core import get_peft_config, list_tuners
        known = {info.peft_type: (info.distribution, info.state) for info in list_tuners()}
        assert not any(name.startswith("peft_ia3") for name in sys.modules), "listing imported a plugin"
        get_peft_config({"peft_type": "IA3"}), get_peft_config({"peft_type": "VERA"})
        assert "torch" not in sys.modules, "configs of outside tuners load torch"
        from peft_core import get_peft_model
        from peft_core.testing import tiny
        model = get_peft_model(tiny(), get_peft_config({"peft_type": "IA3", "task_type": "CAUSAL_LM"}), "ia3")
        model.add_adapter("vera", get_peft_config({"peft_type": "VERA", "task_type": "CAUSAL_LM", "r": 4}))
        model.save_pretrained("out")
        events = [(line["event"], line.get("adapter")) for line in map(json.loads, open(os.environ["PEFT_AUDIT_LOG"]))]
        print(json.dumps([known["IA3"], known["VERA"], events, sorted(model.peft_config["ia3"].target_modules)]))
    """
    printed = run_python(code, path=Path(installed), FOLDER=str(tmp_path), PEFT_AUDIT_LOG=str(tmp_path / "audit.jsonl"))
    ia3, vera, events, targets = json.loads(printed)
    assert ia3 == ["peft-ia3", "available"]
    assert vera == ["peft-vera", "available"]
    assert events == [["added", "ia3"], ["activated", None], ["added", "vera"], ["saved", "ia3"], ["saved", "vera"]]
    assert targets == ["down_proj", "k_proj", "v_proj"], "the plugin's defaults are not asked"


# ---- the import contract ----------------------------------------------------------------------------------------------

SOURCES = sorted(path for folder in FOLDERS.values() for part in ("src", "tests") for path in (folder / part).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "examples" / "plugins")))
def test_imports_only_what_is_public(path: Path) -> None:
    faults = list(private_uses(path.read_text(encoding="utf-8")))
    assert not faults, "\n".join(faults)


def test_the_contract_sees_what_it_should() -> None:
    for code in (
        "import peft_core.tuners.index",
        "import peft_core.layers as l",
        "from peft_core.merging.exact import Merge",
        "from peft_core import tuners",
        "from peft_core.config import base",
        "from peft_core import _MODULE_OF",
        "import peft_lora",
        "from peft_loha import LoHaConfig",
        "def f(layer):\n    return layer._init_options",
        "class L:\n    def f(self):\n        return self._base_dtype_and_device()",
        "import importlib\nimportlib.import_module('peft_core.tuners.index')",
        "getattr(object(), '_init_options')",
    ):
        assert list(private_uses(code)), f"not seen: {code}"
    for code in (
        "from peft_core import AdapterLayer, Route",
        "from peft_core.plugins import registry",
        "class L:\n    def __init__(self):\n        self._own = 1\n    def f(self):\n        return self._own, self.__dict__",
        "import torch",
    ):
        assert not list(private_uses(code)), f"refused: {code}"


def private_uses(code: str) -> Iterator[str]:
    """Yield what a source uses of core, or of its neighbours, that no one promised it."""
    tree = ast.parse(code)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _ours(alias.name) and alias.name not in PUBLIC:
                    yield f"{line}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level and _ours(node.module or ""):
            if node.module not in PUBLIC:
                yield f"{line}: from {node.module}"
            else:
                offered = importlib.import_module(node.module).__all__
                yield from (f"{line}: {alias.name} is not in {node.module}.__all__" for alias in node.names if alias.name not in offered)
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            yield f"{line}: .{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("peft_core.") and node.value.count(" ") == 0 and node.value not in (*PUBLIC, "peft_core.tuners"):
                yield f"{line}: the text {node.value!r}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and _private(name.value):
                yield f"{line}: {node.func.id}(…, {name.value!r})"


def _ours(module: str) -> bool:
    return module.partition(".")[0] in ("peft_core", "peft_lora", "peft_loha", "peft_prompt", "peft_tokens")


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_complete(package: str) -> None:
    folder = FOLDERS[package]
    module = package.replace("-", "_")
    assert (folder / "src" / module / "py.typed").is_file()
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {package}\n")
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == package
    assert any(text.startswith("peft-core>=") and "<" in text for text in project["dependencies"]), "core compares this range"
    assert project["optional-dependencies"]["test"] == ["peft-core[testing]"]

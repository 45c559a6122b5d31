"""Who may know whom: core knows no method, tuner packages use what anybody can, files stay small."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
CORE = PACKAGES / "peft-core" / "src" / "peft_core"
TUNERS = ("peft_lora", "peft_loha", "peft_prompt")
#: names of methods and of their parameters, as whole words of identifiers and strings
METHODS = re.compile(r"(?<![A-Za-z])(lora|loha|hada|rslora|dora|prefix_tuning|prompt_tuning|p_tuning|cpt|multitask_prompt_tuning)(?![A-Za-z])", re.I)

#: pieces of names of tensors that are joined to others
TENSOR_NAME_PARTS = re.compile(r"base_model\.|base_layer\.|_orig_mod\.|token_adapter\.")


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str))


def tuner_imports(folder: Path) -> list[str]:
    """Where the modules below a folder import a tuner package."""
    found = []
    for path in sources(folder):
        names = imported(ast.parse(path.read_text(encoding="utf-8")))
        found += [f"{path.relative_to(folder)}: {name}" for name in names if name.partition(".")[0] in TUNERS]
    return found


def documentation(tree: ast.AST) -> set[int]:
    """The nodes that are docstrings, or the table of hints."""
    found: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            found |= {id(e.value) for e in body if isinstance(e, ast.Expr) and isinstance(e.value, ast.Constant)}
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id in ("PACKAGES", "LEGACY_KEYS") for target in node.targets):
            found |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.keyword) and node.arg == "hint":
            found |= {id(inner) for inner in ast.walk(node)}
    return found


#: a name of the specification: a question that every layer answers
CONTRACT = ("supports_lora_conversion",)


def without_contract(text: str) -> str:
    for name in CONTRACT:
        text = text.replace(name, "")
    return text


def method_names(folder: Path) -> list[str]:
    """Where code below a folder (not docs, not hints) names a method."""
    found = []
    for path in sources(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = documentation(tree)
        for node in ast.walk(tree):
            if id(node) in allowed:
                continue
            texts = [without_contract(value) for value in vars(node).values() if isinstance(value, str)]
            found += [f"{path.relative_to(folder)}:{getattr(node, 'lineno', '?')}: {text}" for text in texts if METHODS.search(text)]
    return found


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of core to break."""
    return Path(shutil.copytree(CORE, tmp_path / "peft_core", ignore=shutil.ignore_patterns("__pycache__")))


# ---- names of tensors -------------------------------------------------------------------------------------------------


def tensor_name_parts(folder: Path) -> list[str]:
    """Where code below a folder (not docs, not hints, not templates for other packages) has a piece of a tensor's name with its dot."""
    found = []
    for path in sources(folder):
        if path.name in ("tensor_names.py", "new_tuner.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = documentation(tree)
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed]
        found += [f"{path.relative_to(folder)}:{node.lineno}" for node in texts if TENSOR_NAME_PARTS.search(node.value)]
    return found


def test_only_one_module_builds_and_cuts_names_of_tensors() -> None:
    assert tensor_name_parts(CORE) == []


@pytest.mark.parametrize("line", ['"base_model.model." + key', 'f"{path}.base_layer.weight"', 'key.removeprefix("_orig_mod.")'])
def test_a_piece_of_a_tensor_name_elsewhere_is_found(copied: Path, line: str) -> None:
    path = copied / "tuners" / "index.py"
    path.write_text(f"{path.read_text()}\nNAME = {line}\n")
    assert len(tensor_name_parts(copied)) == 1


# ---- core knows no tuner ----------------------------------------------------------------------------------------------


def test_core_imports_no_tuner_package() -> None:
    assert tuner_imports(CORE) == []


@pytest.mark.parametrize(
    "line", ["import peft_lora", "from peft_loha.layer import Linear", "import importlib; importlib.import_module('peft_prompt')"]
)
@pytest.mark.parametrize("module", ["tuners/index.py", "plugins/registry.py"])
def test_an_import_of_a_tuner_package_in_core_is_found(copied: Path, module: str, line: str) -> None:
    with (copied / module).open("a") as file:
        file.write(f"\n\ndef sneaky():\n    {line}\n")
    assert [text.partition(":")[0] for text in tuner_imports(copied)] == [module]


def test_core_names_no_method_outside_docs_and_hints() -> None:
    assert method_names(CORE) == []


@pytest.mark.parametrize(
    "line",
    ["if spec.peft_type == 'LORA': pass", "key.split('lora_A')", "hada_w1_a = 1", "model.lora_dropout", "def merge_loha(): pass", "f(dora=True)"],
)
def test_a_method_named_in_core_is_found(copied: Path, line: str) -> None:
    path = copied / "tuners" / "index.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert len(method_names(copied)) == 1


def test_the_import_contract_finds_a_core_that_imports_a_tuner(tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="runs in the lint environment; the tests above need nothing")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("core", "lora", "loha", "prompt"):
        source = PACKAGES / f"peft-{package}" / "src" / f"peft_{package}"
        shutil.copytree(source, tmp_path / f"peft_{package}", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]

    def lint() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=False)

    kept = lint()
    assert kept.returncode == 0, kept.stdout + kept.stderr
    with (tmp_path / "peft_core" / "tuners" / "index.py").open("a") as file:
        file.write("\nimport peft_lora\n")
    broken = lint()
    assert broken.returncode != 0
    assert "peft_core.tuners.index -> peft_lora" in broken.stdout


# ---- tuner packages are third parties ---------------------------------------------------------------------------------


def private_names(folder: Path) -> list[str]:
    found = []
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft_core":
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [f"{path.name}: {name}" for name in names if name.startswith("_")]
            elif isinstance(node, ast.Import):
                found += [f"{path.name}: {a.name}" for a in node.names if a.name.startswith("peft_core") and "._" in a.name]
    return found


@pytest.mark.parametrize("package", TUNERS)
def test_tuner_packages_import_public_names_of_core_only(package: str) -> None:
    assert private_names(PACKAGES / package.replace("_", "-") / "src" / package) == []


@pytest.mark.parametrize("line", ["from peft_core.tuners.tuner import _PLAIN", "from peft_core._hidden import x", "import peft_core._hidden"])
def test_an_import_of_a_private_name_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(f"{line}\n")
    assert len(private_names(tmp_path)) == 1


@pytest.mark.parametrize("package", TUNERS)
def test_tuner_packages_do_not_import_one_another(package: str) -> None:
    others = [line for line in tuner_imports(PACKAGES / package.replace("_", "-") / "src" / package) if not line.split(": ")[1].startswith(package)]
    assert others == []


# ---- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(PACKAGES), ids=lambda path: str(path.relative_to(PACKAGES)).partition("src/")[2])
def test_no_module_is_longer_than_400_lines(path: Path) -> None:
    # two classes that everybody meets, each in one file on purpose; most of it is docstrings
    limit = {"adapter_layer.py": 560, "adapted.py": 510}.get(path.name, 400)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", sources(PACKAGES), ids=lambda path: str(path.relative_to(PACKAGES)).partition("src/")[2])
def test_each_module_says_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("package", ["core", "lora", "loha", "prompt"])
def test_each_package_is_typed(package: str) -> None:
    assert (PACKAGES / f"peft-{package}" / "src" / f"peft_{package}" / "py.typed").is_file()

"""`create` writes packages that are found, clean and conforming; from an empty folder to green in minutes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_core.cli import new_tuner
from peft_core.errors import ConfigError, DuplicateTunerError, PeftError
from support import distribution, files_in, run_python

KINDS = ("layer", "prompt")
METHODS = {"layer": "outer-try", "prompt": "cue_try"}


def on_path(package: Path, folder: Path) -> None:
    """Make a written package look installed in `folder`, with the entry point that its pyproject.toml declares."""
    text = (package / "pyproject.toml").read_text()
    group = text.split('[project.entry-points."peft_core.tuners"]\n')[1].splitlines()[0].split("#")[0]
    key, module = (part.strip().strip('"') for part in group.split("="))
    shutil.copytree(package / "src", folder, dirs_exist_ok=True)
    distribution(folder, package.name, version="0.1.0", requires=("peft-core<0.2,>=0.1",), plugins={key: module})
    points = folder / f"{package.name.replace('-', '_')}-0.1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("peft_core.plugins", "peft_core.tuners"))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Both kinds, written into an empty folder and put on a path."""
    for kind, name in METHODS.items():
        on_path(new_tuner.create(name, kind, tmp_path), tmp_path / "site")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_files(tmp_path: Path, kind: str) -> None:
    package = new_tuner.create("my-method", kind, tmp_path)
    assert package == tmp_path / "peft-my-method"
    part = {"layer": "layer", "prompt": "encoder"}[kind]
    modules = [
        f"src/peft_my_method/{name}" for name in ("__init__.py", "config.py", "formulas.py", f"{part}.py", "plugin.py", "py.typed", "tuner.py")
    ]
    others = [".github/workflows/ci.yml", ".gitignore", "LICENSE", "README.md", "noxfile.py", "pyproject.toml", "tests/test_my_method.py"]
    assert sorted(files_in(package)) == sorted([*modules, *others])
    assert os.listdir(tmp_path) == [package.name], "something else was left"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "my_method", "v2_9", "a" * new_tuner.LONGEST])
def test_no_mark_is_left_and_it_compiles(name: str, kind: str) -> None:
    for path, text in new_tuner.render(name, kind).items():
        assert "@@" not in text, f"{path} has a mark of the template"
        assert "@@" not in path
        assert "{" not in path
        assert text == "" or text.endswith("\n"), f"{path} ends without a line end"
        if path.endswith(".py"):
            ast.parse(text, path)
            assert max(map(len, text.splitlines())) <= 120, f"{path} has a long line"


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_the_suite_beside_our_tuners(installed: Path, kind: str) -> None:
    name = METHODS[kind].replace("-", "_")
    package = installed / f"peft-{name.replace('_', '-')}"
    env = {**os.environ, "PYTHONPATH": str(installed / "site"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py"]
    done = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_they_mix(installed: Path) -> None:
    code = """
        import torch
        from peft_core import get_peft_config, get_peft_model
        from peft_core.testing import tiny
        model = get_peft_model(tiny(), get_peft_config({"peft_type": "OUTER_TRY", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}))
        model.add_adapter("cue", get_peft_config({"peft_type": "CUE_TRY", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}))
        model.set_adapter(["default", "cue"])
        print(model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape[1])
    """
    assert run_python(code, path=installed / "site") == "5"


def test_listing_and_configs_import_no_torch(installed: Path) -> None:
    code = """
        import sys
        from peft_core import get_peft_config, list_tuners
        import peft_core.cli.new_tuner
        assert {"OUTER_TRY", "CUE_TRY"} <= {tuner.peft_type for tuner in list_tuners()}
        print(get_peft_config({"peft_type": "OUTER_TRY"}).alpha, get_peft_config({"peft_type": "CUE_TRY"}).init_std, "torch" in sys.modules)
    """
    assert run_python(code, path=installed / "site") == "1.0 0.02 False"


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("MyMethod", "my-method"),
        ("my method", "my-method"),
        ("peft-mine", "mine"),
        ("9lives", "lives"),
        ("", "my-method"),
        ("../up", "up"),
        ("a--b", "a-b"),
    ],
)
def test_a_malformed_name_is_refused_with_a_better_one(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        new_tuner.create(name, "layer", tmp_path)
    assert repr(hint) in str(caught.value)
    assert caught.value.code == "new-tuner-name"
    assert os.listdir(tmp_path) == []


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        new_tuner.create("mine", "layers", tmp_path)


@pytest.mark.parametrize("name", ["taken", "core"])
def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    distribution(tmp_path / "site", "somebodys-tuner", tuners={"taken": "somebodys"})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PEFT_CORE_PLUGINS", "-somebodys-tuner")  # switched off is still there
    with pytest.raises(DuplicateTunerError, match={"taken": "somebodys-tuner", "core": "peft-core"}[name]):
        new_tuner.create(name, "layer", tmp_path)
    assert os.listdir(tmp_path) == ["site"]


def test_a_folder_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "peft-mine").mkdir()
    (tmp_path / "peft-mine" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        new_tuner.create("mine", "layer", tmp_path)
    assert files_in(tmp_path) == {"peft-mine/notes": b"mine"}
    with pytest.raises(PeftError, match="no folder"):
        new_tuner.create("mine", "layer", tmp_path / "nowhere")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "peft-mine").mkdir()
    assert files_in(new_tuner.create("mine", "prompt", tmp_path))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", ["write_text", "rename"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, there: bool) -> None:
    if there:
        (tmp_path / "peft-mine").mkdir()
    real, calls = getattr(Path, what), []

    def fails(self: Path, *args: object, **kwargs: object) -> object:
        calls.append(self)
        if what == "rename" or len(calls) == 5:
            raise OSError("disk full")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, what, fails)
    with pytest.raises(OSError, match="disk full"):
        new_tuner.create("mine", "layer", tmp_path)
    assert os.listdir(tmp_path) == (["peft-mine"] if there else [])
    assert files_in(tmp_path) == {}

"""Each script of examples/compat runs; `nox -s compat-examples` compares what it writes with what it writes on the peer."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "compat"
COMPARE = runpy.run_path(str(ROOT / "scripts" / "compare_runs.py"))
#: packages that the session of these tests does not install
QUANTISED = {"int8_speech_recognition", "loftq_nf4"}


def numbers(found: Any) -> list[float]:
    """Return all numbers of a JSON value."""
    if isinstance(found, (dict, list)):
        return [number for each in (found.values() if isinstance(found, dict) else found) for number in numbers(each)]
    return [float(found)] if isinstance(found, (int, float)) else []


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - QUANTISED))
def test_script_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = numbers(json.loads((tmp_path / "metrics.json").read_text()))
    assert found
    assert all(map(math.isfinite, found))
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def written(folder: Path, loss: float = 1.0, weight: float = 1.0, config: str = '{"r": 8, "target_modules": ["v", "q"]}') -> Path:
    """Return a folder such as a script leaves."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"losses": [0.5, loss]}))
    (folder / "adapter" / "adapter_config.json").write_text(config)
    safetensors.torch.save_file({"a": torch.full((2, 2), weight)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def test_runs_are_equal_where_names_stand_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMPARE["main"](written(tmp_path / "one", 1.0, 1.0), written(tmp_path / "two", 1.000001, 1.0000001, '{"r": 8, "target_modules": ["q", "v"]}'))
    assert capsys.readouterr().out == "one: numbers differ by at most 1.0e-06, tensors by 1.2e-07\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": 1.0001}, r"one/metrics.json: .losses\[1\]: 1.0 and 1.0001 differ by 1.00e-04"),
        ({"loss": math.nan}, r"one/metrics.json: .losses\[1\]: 1.0 and nan"),
        ({"weight": 1.00001}, "one/adapter/adapter_model.safetensors: a: differ by 1.00e-05"),
        ({"weight": math.nan}, "one/adapter/adapter_model.safetensors: a: differ by nan"),
        ({"config": '{"r": 4, "target_modules": ["q", "v"]}'}, "one/adapter/adapter_config.json: .r: 8 and 4"),
    ],
)
def test_runs_that_differ_are_found(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        COMPARE["main"](written(tmp_path / "one"), written(tmp_path / "two", **change))


def test_a_file_of_one_run_only_is_found(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    (two / "adapter" / "README.md").touch()
    with pytest.raises(SystemExit, match=r"one/adapter/README.md: only in one of the folders"):
        COMPARE["main"](one, two)

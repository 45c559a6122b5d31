"""What the tests of the commands share: adapters to look at, and commands run in this process.

This module loads without typer, which is an extra: the folder's `conftest.py` imports it, and tests without commands run all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from peft_core import PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

if TYPE_CHECKING:
    from typer.testing import Result

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
IDS = torch.arange(1, 9).view(1, 8)


def saved(folder: Path, base: str = "llama", **fields: Any) -> PeftModel:
    """Write an adapter with random weights, and return its model."""
    model = get_peft_model(tiny(base), get_peft_config({**LORA, **fields}))
    randomise(model, "default", 1)
    model.save_pretrained(folder)
    return model.eval()


def run(*words: str) -> Result:
    from typer.testing import CliRunner

    from peft_core.cli.app import app

    return CliRunner().invoke(app, words)


def report(*words: str, code: int = 0) -> Any:
    """What a command prints as JSON: all of stdout must be that."""
    done = run(*words, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def checks(*words: str, code: int = 0) -> dict[str, tuple[str, str]]:
    (adapter,) = report("verify", *words, code=code)["adapters"]
    return {check["check"]: (check["state"], check["detail"]) for check in adapter["checks"]}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of an adapter's file."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})

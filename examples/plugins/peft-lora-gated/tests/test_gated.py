"""Gated LoRA: its formula, its settings in files, and what it adds to models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_core import ConfigError, PeftModel, PeftWarning, get_peft_model
from peft_lora import LoraConfig
from torch import nn

from peft_lora_gated import GateSettings

X = torch.ones(2, 3)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4))


def gated(**settings: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["0"], variant="gated", plugin_settings={"gated": settings}, init_lora_weights=False)
    return get_peft_model(base(), config).eval()


def test_the_gate_scales_what_the_adapter_adds() -> None:
    model = gated(start=0.5)
    layer = model.get_base_model()[0]
    a, b = layer.factors("default")
    torch.testing.assert_close(model(X), base()(X) + 0.5 * 4 * X @ a.T @ b.T)
    model(X).sum().backward()
    assert layer.lora_gate["default"].grad.abs() > 0
    torch.testing.assert_close(model.merge_and_unload()(X), base()(X) + 0.5 * 4 * X @ a.T @ b.T)


def test_a_call_says_how_strong_it_is() -> None:
    model = gated()
    whole = model(X) - base()(X)
    torch.testing.assert_close(model(X, gate_strength=0.25), base()(X) + 0.25 * whole)
    torch.testing.assert_close(model(X, gate_strength=0.0), base()(X))


def test_settings_go_into_the_file_and_come_back(tmp_path: Path) -> None:
    model = gated(start=0.5, penalty=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["plugin_settings"] == {"gated": {"start": 0.5, "penalty": 0.1}}
    read: Any = PeftModel.from_pretrained(base(), tmp_path)
    assert read.peft_config["default"].plugin_settings == {"gated": GateSettings(0.5, 0.1)}
    torch.testing.assert_close(read(X), model(X))


def test_without_settings_the_defaults_are_taken() -> None:
    config = LoraConfig(target_modules=["0"], variant="gated")
    assert config.plugin_settings == {"gated": GateSettings()}
    assert "plugin_settings" not in LoraConfig().to_dict()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"plugin_settings\['gated'\] has no field 'strat'; did you mean 'start'"):
        gated(strat=1.0)
    with pytest.raises(ValueError, match="start=-1 is negative"):
        gated(start=-1)
    with pytest.raises(ConfigError, match="is a int"):
        LoraConfig(variant="gated", plugin_settings={"gated": 3})
    with pytest.warns(PeftWarning, match=r"plugin_settings\['gatd'\] is ignored"):
        LoraConfig(variant="gated", plugin_settings={"gatd": {}})


def test_the_penalty_is_an_operation_of_the_model() -> None:
    model = gated(start=3.0, penalty=0.5)
    torch.testing.assert_close(model.gate_penalty(), torch.tensor(4.5))


def test_other_adapters_are_refused() -> None:
    model = gated()
    with pytest.raises(ConfigError, match="either all adapters of a model are gated or none is"):
        model.add_adapter("plain", LoraConfig(target_modules=["0"]))

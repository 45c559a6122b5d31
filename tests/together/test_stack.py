"""Several adapters of any methods saved as one stack, and read again as they were: names, order, which are in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import AdapterFileError, AdapterWeightsError, PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]},
    "ha": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]},
    "pre": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "unused": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
}


@pytest.fixture
def model() -> PeftModel:
    wrapped = None
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        config = get_peft_config({"task_type": "CAUSAL_LM", **fields})
        if wrapped is None:
            wrapped = get_peft_model(tiny(), config, name)
        else:
            wrapped.add_adapter(name, config)
        randomise(wrapped, name, seed)
    assert wrapped is not None
    wrapped.set_adapter(["default", "ha", "pre"])
    return wrapped.eval()


def output(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13).view(2, 6)).logits


def test_a_stack_comes_back_as_it_was(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_stack(tiny(), tmp_path)
    assert type(loaded) is type(model)
    assert list(loaded.peft_config) == list(CONFIGS)
    assert loaded.active_adapters == ["default", "ha", "pre"]
    assert torch.equal(output(loaded), output(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_it_goes_on_training_if_asked(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_stack(tiny(), tmp_path, is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_manifest_says_who_wrote_what(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "peft_stack.json").read_text())
    assert [member["name"] for member in manifest["adapters"]] == list(CONFIGS)
    assert manifest["adapters"][0]["folder"] == "."
    assert manifest["adapters"][1]["written_by"].startswith("peft-loha ")


def test_a_single_adapter_needs_no_manifest(tmp_path: Path) -> None:
    get_peft_model(tiny(), get_peft_config({"peft_type": "LORA"})).save_pretrained(tmp_path)
    assert not (tmp_path / "peft_stack.json").exists()
    with pytest.raises(AdapterFileError, match="use from_pretrained"):
        PeftModel.from_stack(tiny(), tmp_path)


def test_a_stack_with_one_bad_member_leaves_the_base_as_it_was(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny("gpt2"), get_peft_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}), "pre")
    other.save_pretrained(tmp_path)
    base = tiny().train()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises((AdapterWeightsError, ValueError)):
        PeftModel.from_stack(base, tmp_path)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.training
    assert "_peft_index" not in base.__dict__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "newer peft-core"),
        (lambda m: m["adapters"].clear(), "no adapters"),
        (lambda m: m["active"].append("ghost"), "'ghost' as active"),
        (lambda m: m["adapters"][1].update(folder="../elsewhere"), "outside"),
        (lambda m: m["adapters"][1].pop("name"), "can't be read as a manifest"),
    ],
)
def test_a_bad_manifest_is_refused(model: PeftModel, tmp_path: Path, change: Any, message: str) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "peft_stack.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_stack(tiny(), tmp_path)

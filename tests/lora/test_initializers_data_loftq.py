"""Corrections of a base that is quantised already, by LoftQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_lora
from peft_core import AdapterNotFoundError, ConfigError, PeftModel, get_peft_model
from peft_lora import LoraConfig
from peft_lora.initializers.loftq.decomposition import rounded_to_nf4
from support import Unchanged


class Coded(nn.Linear):
    """A Linear that keeps its weight as bytes, as libraries for quantisation do."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, device="meta")
        rounded = rounded_to_nf4(source.weight.detach())
        self.weight = nn.Parameter(rounded.view(torch.uint8), requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(torch.float32), self.bias)


class Small(nn.Module):
    base_model_prefix = "backbone"

    def __init__(self, coded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)
        if coded:
            self.one, self.two = Coded(self.one), Coded(self.two)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def coded(tmp_path: Path, prefix: str = "", **options: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    originals = {name: value.clone() for name, value in Small(coded=False).state_dict().items()}
    save_file({prefix + name: value for name, value in originals.items()}, tmp_path / "model.safetensors")
    return get_peft_model(Small(coded=True), LoraConfig(r=2, lora_alpha=6, target_modules=["one", "two"], **options)), originals


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_quantised_base_is_corrected(prefix: str, tmp_path: Path) -> None:
    model, originals = coded(tmp_path, prefix)
    peft_lora.replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    for name in ("one", "two"):
        layer = getattr(model.base_model.model, name)
        w = originals[f"{name}.weight"]
        rest = w - rounded_to_nf4(w)
        u, s, vt = torch.linalg.svd(rest)
        torch.testing.assert_close(layer.get_delta_weight("default"), u[:, :2] * s[:2] @ vt[:2], atol=1e-6, rtol=0)


def test_a_callback_decides_for_each_layer(tmp_path: Path) -> None:
    model, _ = coded(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def keep(told: PeftModel, name: str) -> bool:
        assert told is model
        assert model.base_model.model.get_submodule(name).get_delta_weight("default").abs().max() > 0
        seen.append(name)
        return name == "two"

    peft_lora.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert seen == ["one", "two"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["base_model.model.two.lora_A.default.weight", "base_model.model.two.lora_B.default.weight"]


def test_the_original_may_be_in_parts(tmp_path: Path) -> None:
    model, originals = coded(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"part{i % 2}.safetensors" for i, name in enumerate(originals)}
    for part in set(places.values()):
        save_file({name: value for name, value in originals.items() if places[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    peft_lora.replace_lora_weights_loftq(model, tmp_path)
    assert model.base_model.model.one.get_delta_weight("default").abs().max() > 0


def test_what_replace_lora_weights_loftq_refuses(tmp_path: Path) -> None:
    model, originals = coded(tmp_path)
    replace = peft_lora.replace_lora_weights_loftq
    with Unchanged(model), pytest.raises(AdapterNotFoundError, match="'defalt' not found; did you mean 'default'"):
        replace(model, tmp_path, "defalt")
    with pytest.raises(ConfigError, match="no layer of the adapter 'default' has a quantised weight"):
        replace(get_peft_model(Small(coded=False), LoraConfig(target_modules=["one"])), tmp_path)
    with pytest.raises(ConfigError, match="pass model_path"):
        replace(model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        replace(model, tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        replace(model, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not in the cache of the Hub"):
        replace(model, "nobody/nothing")
    save_file({"one.weight": originals["one.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"no tensor 'two.weight'"):
        replace(model, tmp_path / "part.safetensors")
    save_file({"one.weight": torch.ones(3, 3), "two.weight": torch.ones(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=r"'one.weight' is \(3, 3\).*layer is \(8, 6\)"):
        replace(model, tmp_path / "wrong.safetensors")

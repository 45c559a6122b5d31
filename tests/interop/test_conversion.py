"""Adapters converted to LoRA by both libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from interop.cases import BY_ID, base, batch, ours, outputs, peer, saved, using

CASES = ["loha-linear", "loha-no-init", "loha-patterns", "loha-saved", "loha-bert-cls", "lora-linear", "lora-rslora", "lora-gpt2"]


def pair(name: str, tmp_path: Path) -> tuple[Any, Any]:
    """Return one model of each library with the same adapter."""
    case = BY_ID[name]
    model = saved(case, ours, tmp_path)
    return model.eval(), case.load(peer, tmp_path).eval()


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[key.replace("lora_A", "lora_B")] @ value for key, value in tensors.items() if "lora_A" in key}


@pytest.mark.parametrize("rank", [1, 4, 0.5, 0.9])
@pytest.mark.parametrize("name", CASES)
def test_same_conversion(name: str, rank: int | float, tmp_path: Path) -> None:
    models = pair(name, tmp_path)
    made = []
    for library, model in zip((ours, peer), models, strict=True):
        with using(library):
            made.append(library.convert_to_lora(model, rank))
    (config, tensors), (expected_config, expected) = made
    assert tensors.keys() == expected.keys()
    assert {key: value.shape for key, value in tensors.items()} == {key: value.shape for key, value in expected.items()}
    for key, value in products(expected).items():
        torch.testing.assert_close(products(tensors)[key], value, rtol=0, atol=1e-5)
    for key, value in expected.items():
        if "lora_" not in key:
            assert torch.equal(tensors[key], value)
    assert (config.r, config.lora_alpha) == (expected_config.r, expected_config.lora_alpha)


@pytest.mark.parametrize("name", ["loha-linear", "loha-saved", "lora-gpt2"])
@pytest.mark.parametrize("rank", [3, 0.95])
def test_the_peer_reads_what_we_converted(name: str, rank: int | float, tmp_path: Path) -> None:
    case = BY_ID[name]
    model, _ = pair(name, tmp_path / "from")
    ours.save_as_lora(tmp_path / "to", model, rank)
    found = []
    for library in (ours, peer):
        with using(library):
            again = library.PeftModel.from_pretrained(base(case.base), tmp_path / "to")
        found.append(outputs(library, again, batch(case.base))["logits"])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


# ---- what the peer gets wrong ---------------------------------------------------------------------------------------------


def test_dora_is_converted_with_its_lengths(tmp_path: Path) -> None:
    inputs = batch("llama")
    errors = []
    for library in (ours, peer):
        with using(library):
            torch.manual_seed(2)
            config = library.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            model = library.get_peft_model(base("llama"), config).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "magnitude" in name:
                        parameter.mul_(2)
            expected = outputs(library, model, inputs)["logits"]
            made, tensors = library.convert_to_lora(model, 1.0)
            again = library.get_peft_model(base("llama"), made)
            library.set_peft_model_state_dict(again, tensors)
            errors.append(float((outputs(library, again, inputs)["logits"] - expected).abs().max()))
    assert errors[0] < 1e-4
    assert errors[1] > 0.1


def test_heads_of_several_parts_keep_their_names() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.body(x))
            return found

    heads = []
    for library in (ours, peer):
        with using(library):
            model = library.get_peft_model(Headed(), library.LoHaConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
            heads.append({key for key in library.convert_to_lora(model, 1)[1] if "head" in key})
    assert len(heads[0]) == 4
    assert len(heads[1]) < 4


def test_files_say_their_format(tmp_path: Path) -> None:
    formats = []
    for name, library in (("ours", ours), ("peer", peer)):
        with using(library):
            model = library.get_peft_model(base("llama"), library.LoHaConfig(r=2, target_modules=["q_proj"]))
            library.save_as_lora(tmp_path / name, model, 1)
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            formats.append((file.metadata() or {}).get("format"))
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert formats == ["pt", None]


def test_a_path_that_ends_another_keeps_its_rank() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.inner = nn.Linear(4, 4), nn.ModuleDict({"up": nn.Linear(4, 4)})

    fits = []
    for library in (ours, peer):
        with using(library):
            model = library.get_peft_model(Nested(), library.LoHaConfig(r=2, target_modules=["up"], init_weights=False))
            with torch.no_grad():  # rank 4 at the short path, 1 at the long one
                for name, parameter in model.named_parameters():
                    if "hada_w1_a" in name or "hada_w2_a" in name:
                        parameter[:, 1 if "inner" in name else 2 :] = 0
            made, tensors = library.convert_to_lora(model, 1.0)
            try:
                library.set_peft_model_state_dict(library.get_peft_model(Nested(), made), tensors)
                fits.append(True)
            except RuntimeError:
                fits.append(False)
    assert fits[0]
    assert not fits[1]


@pytest.mark.parametrize("layer", ["embedding", "convolution"])
def test_layers_that_the_peer_refuses(layer: str) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = nn.Embedding(8, 6) if layer == "embedding" else nn.Conv2d(3, 6, 2)

    for library in (ours, peer):
        with using(library):
            model = library.get_peft_model(One(), library.LoraConfig(r=2, target_modules=["target"], init_lora_weights=False))
            if library is peer:
                with pytest.raises(TypeError):
                    library.convert_to_lora(model, 2)
            else:
                assert len(library.convert_to_lora(model, 2)[1]) == 2

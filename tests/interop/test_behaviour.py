"""What is seen from outside besides files: status, several adapters at once, rows with adapters of their own, deleting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from interop.cases import BY_ID, LOHA, LORA, Case, assert_close, base, batch, difference, ours, outputs, peer, saving, shake, using


@pytest.mark.parametrize("case", [*LORA, *LOHA], ids=lambda case: case.id)
def test_same_status(case: Case) -> None:
    layers, models = [], []
    for library in (ours, peer):
        with using(library):
            model = case.make(library)
            layers.append(sorted((dataclasses.asdict(layer) for layer in model.get_layer_status()), key=lambda layer: layer["name"]))
            models.append(dataclasses.asdict(model.get_model_status()))
    assert layers[0] == layers[1]
    assert models[0] == models[1]


SECOND = {
    "lora-linear": {"r": 2, "lora_alpha": 10, "target_modules": ["k_proj", "v_proj"]},
    "lora-gpt2": {"r": 2, "target_modules": ["c_attn"]},
    "lora-embedding": {"r": 2, "target_modules": ["embed_tokens", "v_proj"]},
    "lora-bert-cls": {"r": 2, "target_modules": ["query"]},
    "lora-saved": {"r": 2},
    "loha-linear": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}


def pair(case: Case, tmp_path: Path) -> tuple[Any, Any]:
    """Return one model of each library with the same two adapters, "default" and "other"."""
    model = case.make(ours)
    shake(model)
    model.add_adapter("other", getattr(ours, case.config)(**{**case.options, **SECOND[case.id]}))
    model.set_adapter("other")
    shake(model, seed=8)
    model.set_adapter("default")
    with saving(ours, case):
        model.save_pretrained(tmp_path)
    other = case.load(peer, tmp_path)
    with using(peer):
        other.load_adapter(tmp_path / "other", "other")
    return model, other


@pytest.mark.parametrize("name", ["lora-linear", "lora-gpt2", "lora-embedding", "loha-linear"])
def test_two_adapters_add_up(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    found = []
    for library, model in zip((ours, peer), pair(case, tmp_path), strict=True):
        alone = outputs(library, model, batch(case.base))
        with using(library):
            model.base_model.set_adapter(["default", "other"])
        found.append(outputs(library, model, batch(case.base)))
        assert difference(alone, found[-1]) > 1e-2
    assert_close(*found)


@pytest.mark.parametrize("name", ["lora-linear", "lora-gpt2", "lora-embedding", "lora-bert-cls", "lora-saved"])
def test_rows_with_adapters_of_their_own(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    names = ["other", "__base__", "default"]
    found = [
        outputs(library, model, {**batch(case.base), "adapter_names": names})
        for library, model in zip((ours, peer), pair(case, tmp_path), strict=True)
    ]
    assert_close(*found)


@pytest.mark.parametrize("name", SECOND)
def test_trainable_after_switching(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    seen = []
    for library, model in zip((ours, peer), pair(case, tmp_path), strict=True):
        with using(library):
            flags = []
            for adapter in ("other", "default", "other"):
                model.set_adapter(adapter)
                flags.append({n for n, p in model.named_parameters() if p.requires_grad})
            seen.append((flags, model.get_nb_trainable_parameters(), model.active_adapter, sorted(model.peft_config)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", SECOND)
def test_deleted(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    found, names = [], []
    for library, model in zip((ours, peer), pair(case, tmp_path), strict=True):
        with using(peer):  # both say which adapter takes over
            model.delete_adapter("default")
            if library is peer:  # it may still call the deleted one active (api.md §12.6)
                model.set_adapter("other")
        names.append({n for n, _ in model.named_parameters()})
        found.append(outputs(library, model, batch(case.base)))
    assert_close(*found)
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["lora-linear", "lora-gpt2", "lora-embedding", "loha-linear", "lora-bert-cls", "lora-saved"])
def test_merged_and_taken_out_again(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    merged, after = [], []
    for library, model in zip((ours, peer), pair(case, tmp_path), strict=True):
        before = outputs(library, model, batch(case.base))
        with using(library):
            model.merge_adapter(["default", "other"])
        merged.append(outputs(library, model, batch(case.base)))
        with using(library):
            model.unmerge_adapter()
        after.append(outputs(library, model, batch(case.base)))
        assert_close(after[-1], before, 1e-5)
    assert_close(*merged, 1e-5)


@pytest.mark.parametrize("name", ["lora-linear", "lora-saved", "loha-linear", "lora-bert-cls"])
def test_unloaded(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    found = []
    for library, model in zip((ours, peer), pair(case, tmp_path), strict=True):
        with using(library):
            plain = model.unload()
        assert plain.state_dict().keys() == base(case.base).state_dict().keys()
        found.append(outputs(library, plain, batch(case.base)))
    assert_close(*found)


@pytest.mark.parametrize("name", ["prompt-random", "prefix-gqa", "prefix-projection", "prompt-gpt2"])
def test_same_prompt_functions(name: str) -> None:
    found = []
    for library in (ours, peer):
        model = BY_ID[name].make(library)
        with using(library), torch.no_grad():
            prompts = model.get_prompt(batch_size=2)
            kept = model.get_prompt_embedding_to_save("default")
        layers = [part for layer in prompts.layers for part in (layer.keys, layer.values)] if hasattr(prompts, "layers") else [prompts]
        found.append([kept, *layers])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

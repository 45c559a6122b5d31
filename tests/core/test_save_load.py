"""Saving and loading: what is read is what was written, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import support
from peft_core import (
    AdapterFileError,
    AdapterNotFoundError,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from support import CueConfig, DenseConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def dense(**fields: Any) -> DenseConfig:
    return DenseConfig(**{"target_modules": ["up", "last"], "modules_to_save": ["head"], "start": "random", **fields})


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(support.net(), dense())
    support.randomise(model, "default")
    return model.eval()


# ---- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_a_fresh_base_with_the_saved_adapter_computes_the_same_bits(model: PeftModel, tmp_path: Path, safe: bool) -> None:
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = PeftModel.from_pretrained(support.net(), tmp_path)
    assert torch.equal(again(support.features()), model(support.features()))


@pytest.mark.parametrize("safe", [True, False])
def test_every_tensor_comes_back_bit_for_bit(model: PeftModel, tmp_path: Path, safe: bool) -> None:
    model.save_pretrained(tmp_path, safe_serialization=safe)
    before, after = get_peft_model_state_dict(model), load_peft_weights(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
        assert value.dtype == after[key].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_saved_in_the_dtype_that_they_have(tmp_path: Path, dtype: torch.dtype) -> None:
    model = get_peft_model(support.net().to(dtype), dense(), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.last.dense_delta"].dtype == dtype


def test_half_precision_adapters_are_kept_in_float32(tmp_path: Path) -> None:
    model = get_peft_model(support.net().to(torch.bfloat16), dense())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["base_model.model.last.dense_delta"].dtype == torch.float32
    assert tensors["base_model.model.head.weight"].dtype == torch.bfloat16


def test_low_memory_loading_gives_the_same_bits(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(support.net(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(again(support.features()), model(support.features()))


def test_virtual_tokens_come_back(tmp_path: Path) -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / WEIGHTS)) == ["cue_table"]
    again = PeftModel.from_pretrained(support.llama(), tmp_path)
    assert torch.equal(again(support.IDS).logits, model(support.IDS).logits)


def test_saving_twice_gives_the_same_bytes(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert support.files_in(tmp_path / "a") == support.files_in(tmp_path / "b")


def test_saving_changes_nothing_in_the_model(model: PeftModel, tmp_path: Path) -> None:
    with support.Unchanged(model):
        model.save_pretrained(tmp_path)


# ---- layout -----------------------------------------------------------------------------------------------------------


def test_default_lies_in_the_root_and_others_in_folders_of_their_names(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("other", dense())
    model.save_pretrained(tmp_path)
    assert set(support.files_in(tmp_path)) == {"README.md", "peft_stack.json", CONFIG, WEIGHTS, f"other/{CONFIG}", f"other/{WEIGHTS}"}


def test_without_a_default_the_root_has_only_the_card(tmp_path: Path) -> None:
    get_peft_model(support.net(), dense(), "other").save_pretrained(tmp_path)
    assert set(support.files_in(tmp_path)) == {"README.md", f"other/{CONFIG}", f"other/{WEIGHTS}"}


def test_keys_hold_no_adapter_name(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    prefix = "base_model.model."
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"{prefix}layers.0.up.dense_delta",
        f"{prefix}layers.1.up.dense_delta",
        f"{prefix}last.dense_delta",
        f"{prefix}head.weight",
        f"{prefix}head.bias",
    }


def test_an_adapter_can_be_loaded_under_any_name(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(support.net(), tmp_path, "french")
    assert list(again.peft_config) == ["french"]
    assert torch.equal(again(support.features()), model(support.features()))


@pytest.mark.parametrize("how", ["subfolder", "path"])
def test_an_adapter_in_a_sub_folder(model: PeftModel, tmp_path: Path, how: str) -> None:
    model.add_adapter("other", dense())
    support.randomise(model, "other", seed=3)
    model.save_pretrained(tmp_path)
    where: Any = {"model_id": tmp_path, "subfolder": "other"} if how == "subfolder" else {"model_id": tmp_path / "other"}
    again = PeftModel.from_pretrained(support.net(), **where)
    model.set_adapter("other")
    assert torch.equal(again(support.features()), model(support.features()))


def test_pickles_are_plain_dicts(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert set(support.files_in(tmp_path)) == {"README.md", CONFIG, PICKLE}
    assert type(torch.load(tmp_path / PICKLE, weights_only=True)) is dict


def test_safetensors_are_found_before_pickles(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / PICKLE).write_bytes(b"older and broken")
    PeftModel.from_pretrained(support.net(), tmp_path)


def test_saving_as_the_other_kind_is_what_is_read_next(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, safe_serialization=True)
    support.randomise(model, "default", seed=9)
    model.save_pretrained(tmp_path, safe_serialization=False)
    again = PeftModel.from_pretrained(support.net(), tmp_path)
    assert torch.equal(again(support.features()), model(support.features()))


def test_metadata_says_pt(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"


# ---- the config beside it ---------------------------------------------------------------------------------------------


def test_the_saved_config_is_for_inference_and_the_object_stays(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


def test_auto_mapping_is_written_when_there_is_no_task(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"] == {"base_model_class": "Net", "parent_library": "support"}


def test_no_auto_mapping_with_a_task(tmp_path: Path) -> None:
    get_peft_model(support.llama(), DenseConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"] is None


def test_the_name_of_the_base_is_noted(tmp_path: Path) -> None:
    base = support.net()
    base.name_or_path = "acme/net"
    model = get_peft_model(base, dense())
    assert model.peft_config["default"].base_model_name_or_path == "acme/net"
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "acme/net"


def test_saved_names_stay_unique_after_many_round_trips(tmp_path: Path) -> None:
    config = DenseConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(support.bert_classifier(), config)
    for _ in range(3):
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(support.bert_classifier(), tmp_path)  # type: ignore[assignment]
    assert sorted(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]).count("classifier") == 1


# ---- arguments --------------------------------------------------------------------------------------------------------


def test_selected_adapters_alone_are_written(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("other", dense())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert set(support.files_in(tmp_path)) == {"README.md", f"other/{CONFIG}", f"other/{WEIGHTS}"}


def test_an_unknown_selected_adapter_writes_nothing(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"'defualt' not found.*'default'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "defualt"])
    assert not (tmp_path / "new").exists()


def test_other_processes_write_no_files(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert (tmp_path / "new").is_dir()
    assert support.files_in(tmp_path) == {}


def test_tensors_can_come_from_a_state_dict(model: PeftModel, tmp_path: Path) -> None:
    given = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(tensors) == set(get_peft_model_state_dict(model))
    assert all((tensor == 2).all() for tensor in tensors.values())


def test_saving_over_a_file_is_an_error_and_keeps_it(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(AdapterFileError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_shared_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["up"], start="random"))
    layers: Any = model.get_base_model().layers
    layers[1].up.dense_delta["default"].data = layers[0].up.dense_delta["default"].data.t()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (tensors[f"base_model.model.layers.{i}.up.dense_delta"] for i in range(2))
    assert torch.equal(a, b.t())


def test_embeddings_are_saved_when_they_are_targeted(tmp_path: Path) -> None:
    model = get_peft_model(support.llama(), DenseConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    PeftModel.from_pretrained(support.llama(), tmp_path)


# ---- loading ----------------------------------------------------------------------------------------------------------


def test_loading_gives_the_class_of_the_task(tmp_path: Path) -> None:
    get_peft_model(support.llama(), DenseConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert type(PeftModel.from_pretrained(support.llama(), tmp_path)) is PeftModelForCausalLM


def test_a_loaded_model_is_frozen_and_in_eval_mode(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(support.net().train(), tmp_path)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not any(module.training for module in again.modules())
    assert again.peft_config["default"].inference_mode


def test_a_loaded_model_can_go_on_training(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(support.net(), tmp_path, is_trainable=True)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in again.named_parameters() if "default" in name.split(".")}


def test_a_loaded_adapter_is_neither_active_nor_trainable(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert model.load_adapter(tmp_path, "other") == ([], [])
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if "other" in name.split("."))
    assert all(p.requires_grad for name, p in model.named_parameters() if "default" in name.split("."))


def test_loading_for_inference_puts_the_model_in_eval_mode(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.train()
    model.load_adapter(tmp_path, "other")
    assert not model.training


def test_loading_a_trainable_adapter(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    assert all(p.requires_grad for name, p in model.named_parameters() if "other" in name.split("."))


def test_loading_over_a_name_writes_into_the_same_parameters(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    expected = model(support.features())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    support.randomise(model, "default", seed=99)
    assert not torch.equal(model(support.features()), expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(support.features()), expected)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_a_config_can_be_given_instead_of_the_files(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = dense(alpha=2)
    again = PeftModel.from_pretrained(support.net(), tmp_path, config=config)
    assert again.peft_config["default"] is config


def test_keys_can_be_renamed(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    base = support.net()
    base.final = base.last
    del base.last
    base.forward = lambda x: base.head(base.final(x))  # type: ignore[method-assign]
    config = dense(target_modules=["up", "final"])
    again: Any = PeftModel.from_pretrained(base, tmp_path, config=config, key_mapping={r"^last\.": "final."})
    assert torch.equal(again.get_base_model().final.dense_delta["default"], model.get_base_model().last.dense_delta["default"])


# ---- state dicts ------------------------------------------------------------------------------------------------------


def test_state_dicts_go_in_as_they_came_out(model: PeftModel) -> None:
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    other = get_peft_model(support.net(), dense(), "x")
    assert set_peft_model_state_dict(other, tensors, "x") == ([], [])
    assert torch.equal(other(support.features()), model(support.features()))


def test_a_partial_state_dict_reports_what_it_lacks(model: PeftModel) -> None:
    tensors = get_peft_model_state_dict(model)
    key = next(iter(tensors))
    result = set_peft_model_state_dict(model, {key: tensors[key]})
    assert set(result.missing_keys) == set(tensors) - {key}
    assert result.unexpected_keys == []


def test_the_state_dict_of_an_unknown_adapter_is_a_key_error(model: PeftModel) -> None:
    with pytest.raises(KeyError, match="'other' not found"):
        get_peft_model_state_dict(model, adapter_name="other")


def test_a_model_without_adapters_has_no_state_dict() -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter layers found"):
        get_peft_model_state_dict(nn.Linear(2, 2))


def test_a_compiled_model_can_be_unwrapped(model: PeftModel) -> None:
    compiled: Any = torch.compile(model)
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == get_peft_model_state_dict(model).keys()

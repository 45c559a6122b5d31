"""Rows of "What an outside reader meets" in docs/compat.md, in their order: each test shows what code finds here instead of what `peft` does."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import peft
from compat import tiny
from peft.functional import delete_adapter
from peft.utils.hotswap import hotswap_adapter

pytestmark = pytest.mark.filterwarnings("ignore::peft.PeftWarning")
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **CAUSAL, **fields})


def adapted(base: Any = None, **fields: Any) -> Any:
    return peft.get_peft_model(tiny.llama() if base is None else base, lora(**fields))


def two(**fields: Any) -> Any:
    model = tiny.randomise(adapted(**fields))
    model.add_adapter("b", lora(**fields))
    return tiny.randomise(model, "b")


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def prompt() -> Any:
    return peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL)


def first_layer(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


# ---- training or not -------------------------------------------------------------------------------------------------
def test_the_mode_is_that_of_the_base() -> None:
    model = tiny.randomise(adapted(lora_dropout=0.5))
    assert not model.training
    assert not first_layer(model).training
    assert torch.equal(model(tiny.IDS).logits, model(tiny.IDS).logits)
    model.train()
    assert not torch.equal(model(tiny.IDS).logits, model(tiny.IDS).logits)


@pytest.mark.parametrize("config", [prompt(), lora(bias="lora_only")], ids=["prompt", "bias"])
def test_what_is_loaded_for_inference_is_frozen(config: Any, tmp_path: Path) -> None:
    peft.get_peft_model(tiny.llama(attention_bias=True), config).save_pretrained(tmp_path)
    assert trained(peft.PeftModel.from_pretrained(tiny.llama(attention_bias=True), tmp_path)) == []
    assert trained(peft.PeftModel.from_pretrained(tiny.llama(attention_bias=True), tmp_path, is_trainable=True)) != []


def test_an_added_prompt_is_frozen_until_it_is_used() -> None:
    model = peft.get_peft_model(tiny.llama(), prompt())
    model.add_adapter("b", prompt())
    assert trained(model) == ["prompt_encoder.default.embedding.weight"]
    model.set_adapter("b")
    assert trained(model) == ["prompt_encoder.b.embedding.weight"]


def test_flags_can_be_set_for_prompts_and_biases() -> None:
    for config in (prompt(), lora(bias="lora_only")):
        model = peft.get_peft_model(tiny.llama(attention_bias=True), config)
        model.set_requires_grad("default", False)
        assert trained(model) == []


def test_switching_off_leaves_flags_alone() -> None:
    model = adapted()
    before = trained(model)
    with model.disable_adapter():
        assert trained(model) == before
        assert model.get_model_status().requires_grad == {"default": True}


def test_loading_over_an_adapter_leaves_the_mode(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    model.train().load_adapter(tmp_path, "default")
    assert model.training
    model.load_adapter(tmp_path, "other")
    assert not model.training


# ---- results and arguments -------------------------------------------------------------------------------------------
def test_keys_of_a_load_result_are_those_of_the_file(tmp_path: Path) -> None:
    model = adapted()
    tensors = peft.get_peft_model_state_dict(model)
    left_out = next(iter(tensors))
    found = peft.set_peft_model_state_dict(model, {key: value for key, value in tensors.items() if key != left_out})
    assert list(found.missing_keys) == [left_out]
    model.save_pretrained(tmp_path)
    assert list(model.load_adapter(tmp_path, "b").missing_keys) == []


def test_a_state_dict_is_completed_from_the_model() -> None:
    model = adapted()
    assert peft.get_peft_model_state_dict(model, state_dict={}).keys() == peft.get_peft_model_state_dict(model).keys()


def test_several_adapters_in_use_are_a_list() -> None:
    model = two()
    model.base_model.set_adapter(["default", "b"])
    assert model.active_adapter == ["default", "b"]
    with pytest.raises(AttributeError):
        model.active_adapter = "b"


def test_names_that_are_unknown_are_errors() -> None:
    model = adapted()
    for call in (model.base_model.set_adapter, model.merge_adapter):
        with pytest.raises(ValueError, match="Adapter 'zz' not found"):
            call(["zz"])


def test_forward_has_the_arguments_of_the_base() -> None:
    model, mask = tiny.randomise(adapted()), torch.ones_like(tiny.IDS)
    positions = torch.arange(tiny.IDS.shape[1])[None]
    assert torch.allclose(model(tiny.IDS, mask, positions).logits, model(input_ids=tiny.IDS, attention_mask=mask).logits, atol=1e-6)
    assert "inputs_embeds" not in inspect.signature(model.forward).parameters
    assert "inputs_embeds" in inspect.signature(model.get_base_model().forward).parameters


def test_inputs_of_generate_are_prepared_by_the_model_alone() -> None:
    model = peft.get_peft_model(tiny.llama(), prompt())
    found = model.prepare_inputs_for_generation(tiny.IDS, attention_mask=torch.ones_like(tiny.IDS), is_first_iteration=True)
    assert found["attention_mask"].shape == tiny.IDS.shape


def test_configs_are_made_by_keyword_and_checked_at_once() -> None:
    for wrong in ({"r": 0}, {"bias": "some"}, {"lora_dropout": 2.0}, {"init_lora_weights": "some"}, {"modules_to_save": "head"}):
        with pytest.raises(ValueError, match=r"."):
            peft.LoraConfig(**wrong)
    assert list(inspect.signature(peft.LoraConfig).parameters)[7] != "r"


def test_types_are_open() -> None:
    assert peft.PeftType("MINE").value == "MINE"
    assert str(peft.TaskType.CAUSAL_LM) == "CAUSAL_LM"
    assert peft.PromptTuningConfig(num_virtual_tokens=1).to_dict()["prompt_tuning_init"] == "RANDOM"


# ---- layers ----------------------------------------------------------------------------------------------------------
def test_the_change_of_a_layer_with_dora_is_the_whole_change() -> None:
    model = tiny.randomise(adapted(use_dora=True))
    layer = first_layer(model)
    before, delta = layer.weight.clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.allclose(layer.weight, before + delta, atol=1e-5)


def test_scales_of_embeddings_and_convolutions_are_set() -> None:
    model = adapted(target_modules=["embed_tokens"])
    layer = model.get_base_model().model.embed_tokens
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0


def test_layers_of_injection_get_adapters_from_the_model_alone() -> None:
    assert not hasattr(first_layer(adapted()), "update_layer")
    assert str(first_layer(adapted())).startswith("Linear(\n  adapters=['default']")


def test_saved_modules_and_layers_of_loha_are_made_by_injection_alone() -> None:
    wrapper = peft.utils.ModulesToSaveWrapper(torch.nn.Linear(4, 4), "default")
    assert len(wrapper.modules_to_save) == 0
    layers: Any = importlib.import_module("peft.tuners.loha.layer")
    with pytest.raises(TypeError):
        layers.Linear(torch.nn.Linear(4, 4), "default", peft.LoHaConfig(), r=2, alpha=2)


# ---- conversion, combination, swapping -------------------------------------------------------------------------------
def test_what_can_be_converted() -> None:
    assert not adapted(use_dora=True).supports_lora_conversion()
    assert adapted(target_modules=["embed_tokens"]).supports_lora_conversion()
    config, _ = peft.convert_to_lora(adapted(), 3)
    assert config.task_type == "CAUSAL_LM"
    assert config.target_modules == {"q_proj", "v_proj"}


def test_trainable_tokens_are_converted() -> None:
    config = peft.TrainableTokensConfig(token_indices=[3, 9], target_modules=["embed_tokens"], **CAUSAL)
    model = tiny.randomise(peft.get_peft_model(tiny.llama(), config))
    made, tensors = peft.convert_to_lora(model, 2)
    plain = peft.get_peft_model(tiny.llama(), made)
    peft.set_peft_model_state_dict(plain, tensors)
    assert tiny.worst(tiny.outputs(plain), tiny.outputs(model)) < 1e-5


REFUSED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 9]},
    "replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=list(REFUSED))
def test_adapters_that_are_not_combined(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"add_weighted_adapter does not support|no effect of its own|combination_type='linear'"):
        two(**fields).add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", "linear")


def test_a_combination_under_a_name_that_exists() -> None:
    with pytest.raises(ValueError, match="already exists"):
        two().add_weighted_adapter(["default", "b"], [0.7, 0.4], "b", "linear")


def test_a_combination_of_rslora_is_the_sum() -> None:
    model = two(use_rslora=True)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", "cat")
    layer = first_layer(model)
    with torch.no_grad():
        expected = 0.7 * layer.get_delta_weight("default") + 0.4 * layer.get_delta_weight("b")
        assert tiny.worst(layer.get_delta_weight("c"), expected) < 1e-5


def test_a_combination_of_different_ranks_by_layer_is_loaded_again(tmp_path: Path) -> None:
    model = two(rank_pattern={"q_proj": 2})
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", "linear")
    model.set_adapter("c")
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "c")
    assert tiny.worst(tiny.outputs(again), tiny.outputs(model)) < 1e-5


def test_parameters_are_not_swapped(tmp_path: Path) -> None:
    model = adapted(target_modules=[], target_parameters=["mlp.gate_proj.weight"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="can't be swapped"):
        hotswap_adapter(model, tmp_path, "default")


def test_the_config_of_a_swapped_adapter_is_that_of_the_file(tmp_path: Path) -> None:
    adapted(lora_alpha=32).save_pretrained(tmp_path)
    model = adapted()
    hotswap_adapter(model, tmp_path, "default")
    assert model.peft_config["default"].lora_alpha == 32


# ---- layers that share weights ---------------------------------------------------------------------------------------
def test_replicated_layers_are_not_merged_and_unloading_restores_the_base() -> None:
    model = adapted(layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="several layers share each weight"):
        model.merge_adapter()
    assert len(model.unload().model.layers) == 2


def test_merging_into_a_tied_weight_changes_the_target_alone() -> None:
    model = tiny.randomise(adapted(tiny.llama(tie_word_embeddings=True), target_modules=["embed_tokens"]))
    before = tiny.outputs(model)
    model.merge_adapter()
    assert tiny.worst(tiny.outputs(model), before) < 1e-4


def test_an_activated_lora_in_a_bare_model_is_an_error() -> None:
    model = peft.inject_adapter_in_model(lora(alora_invocation_tokens=[5, 6]), tiny.llama())
    with pytest.raises(ValueError, match="call the PeftModel"):
        tiny.outputs(model)


def test_tokens_that_are_named_twice() -> None:
    with pytest.raises(ValueError, match="given more than once"):
        adapted(trainable_token_indices=[3, 3])


# ---- status ----------------------------------------------------------------------------------------------------------
def test_prompts_and_mixed_models_have_a_status() -> None:
    assert peft.get_peft_model(tiny.llama(), prompt()).get_model_status().available_adapters == ["default"]
    mixed = peft.get_peft_model(tiny.llama(), lora(), mixed=True)
    assert mixed.get_model_status().enabled
    assert type(mixed.base_model).__name__ == "TunerModel"


def test_types_of_modules_in_a_status_are_our_classes() -> None:
    found = adapted(target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]).get_layer_status()
    assert {layer.module_type for layer in found} == {"lora.Linear", "lora.Parameter"}
    model = adapted(modules_to_save=["lm_head"])
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_file_of_a_prompt_has_its_network(tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL)
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    keys = peft.load_peft_weights(str(tmp_path), device="cpu").keys()
    assert "prompt_embeddings" in keys
    assert "prompt_encoder.embedding.weight" in keys


def test_the_header_and_the_card_of_a_file(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {"peft_tuner", "peft_core", "peft_base"} <= file.metadata().keys()
    assert "base_model: ''" not in (tmp_path / "README.md").read_text()


def test_names_of_saved_modules_stand_once_in_a_file(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tiny.bert(), tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]


# ---- adding and deleting ---------------------------------------------------------------------------------------------
def test_deleting_by_function_takes_the_config_too() -> None:
    model: Any = peft.inject_adapter_in_model(lora(), tiny.llama())
    peft.inject_adapter_in_model(lora(), model, "b")
    delete_adapter(model, "b", prefix="lora_")
    assert list(model.peft_config) == ["default"]


def test_saved_modules_and_prompts_are_made_without_memory_too() -> None:
    for config in (lora(modules_to_save=["lm_head"]), prompt()):
        model = peft.get_peft_model(tiny.llama(), config, low_cpu_mem_usage=True)
        assert all(p.is_meta for name, p in model.named_parameters() if "default" in name)


def test_a_second_model_of_a_base_has_the_prompts_of_the_first() -> None:
    base = tiny.llama()
    peft.get_peft_model(base, prompt())
    model = peft.get_peft_model(base, prompt(), "b")
    assert model.active_adapters == ["default", "b"]
    model.set_adapter("b")
    assert tiny.outputs(model).shape[1] == tiny.IDS.shape[1] + 3


def test_the_quick_decomposition_does_not_depend_on_the_seed() -> None:
    starts = []
    for seed in (1, 2):
        base = tiny.llama()
        torch.manual_seed(seed)
        starts.append(first_layer(adapted(base, init_lora_weights="pissa_niter_4")).weight)
    assert torch.equal(*starts)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x)[0]
        return found


def test_the_out_projection_of_an_attention_counts_once_unless_it_is_asked_for_twice(tmp_path: Path) -> None:
    model = tiny.randomise(peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["attention"])))
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.out_projection_twice = True
    changes = []
    for given in (None, config):
        loaded = peft.PeftModel.from_pretrained(Attention(), tmp_path, config=given)
        changes.append(loaded.merge_and_unload().attention.out_proj.weight - Attention().attention.out_proj.weight)
    assert torch.allclose(changes[1], 2 * changes[0], atol=1e-6)
    with pytest.raises(ValueError, match="can't be swapped"):
        hotswap_adapter(model, tmp_path, "default")


def test_what_raises_a_type_error_in_the_peer() -> None:
    transformers: Any = importlib.import_module("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    assert trained(peft.get_peft_model(gpt2, peft.LoHaConfig(r=2, target_modules=["c_attn"]))) != []
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model = peft.get_peft_model(t5, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"])).eval()
    assert model.generate(tiny.IDS, max_new_tokens=2).shape[0] == len(tiny.IDS)

"""Adapters of mixtures of experts from before transformers 5: configs are rewritten. Filled by transformers' own loader: `tests/compat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora.experts_net import BASES, SIZES, WIDTHS, assert_rewritten, config_for, mixtral, needs_fused_experts, qwen
from peft_core import ConfigError, PeftModel, get_peft_model, inject_adapter_in_model
from peft_lora import LoraConfig

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
pytestmark = needs_fused_experts


@pytest.mark.parametrize(("name", "how"), [("mixtral", "inject"), ("mixtral", "get"), ("qwen", "inject")])
def test_an_old_config_is_rewritten(name: str, how: str) -> None:
    """formats.md §7.1; two names side by side are one parameter now."""
    model, config = BASES[name][0](), config_for(name)
    if how == "inject":
        inject_adapter_in_model(config, model)
    else:
        get_peft_model(model, config)
    assert_rewritten(name, config)
    experts = {key: tuple(value.shape) for key, value in model.named_parameters() if ".experts." in key and "lora_" in key}
    width = WIDTHS[name]
    assert sorted(experts.values()) == sorted([(3 * 4, 16), (2 * width, 3 * 4), (3 * 2, width), (16, 3 * 2)] * 2)


@pytest.mark.parametrize(("name", "given"), [("mixtral", ["w1", "w2"]), ("mixtral", ["q_proj", "w3"]), ("qwen", ["up_proj"])])
def test_one_of_a_pair_is_refused_and_nothing_changes(name: str, given: list[str]) -> None:
    model = BASES[name][0]()
    before = [key for key, _ in model.named_parameters()]
    config = config_for(name, target_modules=given)
    with pytest.raises(ConfigError, match="are one parameter, gate_up_proj"):
        inject_adapter_in_model(config, model)
    assert [key for key, _ in model.named_parameters()] == before
    assert (config.target_modules, config.target_parameters, config.rank_pattern) == (set(given), None, {})


def test_what_comes_after_the_pair_can_go_alone() -> None:
    model, config = mixtral(), config_for("mixtral", target_modules=["w2"])
    inject_adapter_in_model(config, model)
    assert (config.target_parameters, config.target_modules, config.rank_pattern) == (["down_proj"], set(), {})


def test_bases_without_experts_are_left_alone() -> None:
    """The names of Qwen2-MoE's old experts are those of every Llama's modules."""
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    config = config_for("qwen")
    inject_adapter_in_model(config, model)
    assert (config.target_modules, config.target_parameters) == ({"q_proj", "gate_proj", "up_proj", "down_proj"}, None)


def test_a_new_adapter_on_names_of_the_shared_expert_is_on_these_alone() -> None:
    """Only who loads an old file knows that single experts are meant, too."""
    config = config_for("qwen", target_modules=["gate_proj"])
    model = get_peft_model(qwen(), config)
    assert (config.target_modules, config.target_parameters) == ({"gate_proj"}, None)
    assert all(".shared_expert." in key for key, _ in model.named_parameters() if "lora_" in key)


def test_old_names_in_a_second_adapter_of_one_model(tmp_path: Path) -> None:
    model = get_peft_model(mixtral(), config_for("mixtral"))
    model.add_adapter("second", config_for("mixtral", r=4, init_lora_weights=False))
    model.set_adapter("second")
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(mixtral(), tmp_path / "second")
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_older_versions_have_no_other_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with joint experts that transformers 4 has (gpt-oss, Llama 4) never had others."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    base = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES_OF_GPT_OSS))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


SIZES_OF_GPT_OSS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}

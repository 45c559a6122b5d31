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


# ---- "all-linear": experts and routers were linear layers ----------------------------------------------------------------
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SHARED = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("how", ["inject", "get"])
def test_all_linear_means_experts_and_routers(name: str, how: str) -> None:
    model, config = BASES[name][0](), config_for(name, target_modules="all-linear")
    if how == "inject":
        inject_adapter_in_model(config, model)
    else:
        get_peft_model(model, config)
    assert {target.rpartition(".")[2] for target in config.target_modules} == (ATTENTION | SHARED if name == "qwen" else ATTENTION)
    assert config.target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    assert (config.rank_pattern, config.alpha_pattern) == ({r".*\.gate_up_proj": 4}, {r".*\.gate_up_proj": 6})


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"exclude_modules": ["gate"]}, ["down_proj", "gate_up_proj"]),
        ({"exclude_modules": r".*\.experts(\..*)?"}, ["gate.weight"]),
        ({"modules_to_save": ["mlp.gate"]}, ["down_proj", "gate_up_proj"]),
    ],
    ids=["router", "experts", "saved"],
)
def test_all_linear_leaves_out_what_the_config_leaves_out(fields: dict[str, Any], parameters: list[str]) -> None:
    config = config_for("mixtral", target_modules="all-linear", **fields)
    get_peft_model(mixtral(), config)
    assert config.target_parameters == parameters


@pytest.mark.parametrize("fields", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_all_linear_is_refused_where_parameters_can_not_be_adapted_so(fields: dict[str, Any]) -> None:
    model = mixtral()
    with pytest.raises(ConfigError):
        get_peft_model(model, config_for("mixtral", target_modules="all-linear", **fields))
    assert not any("lora_" in key for key, _ in model.named_parameters())


def test_experts_of_the_layers_that_are_asked_for() -> None:
    config = config_for("mixtral", layers_to_transform=[1])
    get_peft_model(mixtral(), config)
    assert config.target_parameters == ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]


# ---- which names are those of experts ------------------------------------------------------------------------------------
def dense_first() -> Any:
    """A mixture whose first layer is dense."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **sizes)).eval()


NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [["layers.0.mlp.gate_proj"], r".*\.0\.mlp\.gate_proj", [f"0.mlp.{name}" for name in NAMES]])
def test_a_qualified_name_of_a_dense_layer_is_no_name_of_experts(targets: Any) -> None:
    config = config_for("qwen", target_modules=targets)
    inject_adapter_in_model(config, dense_first())
    assert (config.target_parameters, config.rank_pattern) == (None, {})


@pytest.mark.parametrize("targets", [[f"experts.{number}.{name}" for number in range(3) for name in NAMES], r".*\.experts\.\d+\.\w+_proj"])
def test_qualified_names_of_experts_mean_these_alone(targets: Any) -> None:
    config = config_for("qwen", target_modules=targets)
    get_peft_model(qwen(), config)
    assert (config.target_modules, config.target_parameters) == (set(), ["down_proj", "gate_up_proj"])


@pytest.mark.parametrize("targets", [["experts.0.w2"], r".*\.experts\.[01]\.w2"])
def test_some_of_the_experts_are_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match="'w2' of some experts alone"):
        get_peft_model(mixtral(), config_for("mixtral", target_modules=targets))


def test_experts_of_one_layer() -> None:
    config = config_for("mixtral", target_modules=r".*layers\.1\..*\.(q_proj|w[123])")
    get_peft_model(mixtral(), config)
    assert config.target_modules == {"model.layers.1.self_attn.q_proj"}
    assert config.target_parameters == ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]


def test_a_router_is_adapted_by_itself() -> None:
    config = config_for("mixtral", target_modules=["q_proj", "gate"])
    get_peft_model(mixtral(), config)
    assert (config.target_modules, config.target_parameters) == ({"q_proj"}, ["gate.weight"])


def test_patterns_that_say_something_of_the_pair_stay() -> None:
    config = config_for("mixtral", target_modules="all-linear", rank_pattern={r".*\.gate_up_proj": 6})
    get_peft_model(mixtral(), config)
    assert config.rank_pattern == {r".*\.gate_up_proj": 6}

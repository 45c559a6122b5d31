"""Adapters of mixtures of experts from before transformers 5 on a base that is not wrapped: injected, and filled by transformers' own loader."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from lora.experts_net import SIZES, mixtral, needs_fused_experts, qwen
from peft_core import (
    ConfigError,
    PeftModel,
    build_peft_weight_mapping,
    convert_peft_config_for_transformers,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_lora import LoraConfig

#: how wide one expert is
WIDTHS = {"mixtral": 24, "qwen": 12}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
pytestmark = needs_fused_experts


#: base → how to make it, the block's name in old files, old names of the pair and of what comes after it
BASES: dict[str, tuple[Callable[[], Any], str, tuple[str, str, str]]] = {
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen": (qwen, "mlp", ("gate_proj", "up_proj", "down_proj")),
}


def config_for(name: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *BASES[name][2]], **fields})


def write(folder: Path, name: str, *, router: bool = False, **fields: Any) -> None:
    """Write an adapter as it was made when each expert was a module."""
    _, block, names = BASES[name]
    width = WIDTHS[name]
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (16, 16)}
    for expert in range(3):
        sizes |= {f"{block}.experts.{expert}.{end}": shape for end, shape in zip(names, ((width, 16), (width, 16), (16, width)), strict=True)}
    if name == "qwen":
        shapes = ((8, 16), (8, 16), (16, 8))
        sizes |= {f"{block}.shared_expert.{end}": shape for end, shape in zip(names, shapes, strict=True)}
    if router:
        sizes[f"{block}.gate"] = (3, 16)
    found: dict[str, Tensor] = {}
    for layer in range(2):
        for path, (out, inp) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            found[f"{stem}.lora_A.weight"] = torch.randn(2, inp, generator=generator) * 0.3
            found[f"{stem}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", *names, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(model: nn.Module, folder: Path, adapter: str) -> set[str]:
    """Do what `model.load_adapter(folder, adapter)` of transformers does with us; return the names that were not filled."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    base: Any = model
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(base), adapter, peft_config=config)
    inject_adapter_in_model(config, base, adapter)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    info, _ = convert_and_load_state_dict_in_model(base, tensors, LoadStateDictConfig(weight_mapping=mapping))
    assert (info.unexpected_keys, info.mismatched_keys, info.conversion_errors) == (set(), set(), {})
    return {key for key in info.missing_keys if f".{adapter}." in key}


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("router", [False, True], ids=["", "router"])
@pytest.mark.parametrize("name", BASES)
def test_transformers_loads_what_from_pretrained_loads(name: str, router: bool, fields: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, name, router=router, **fields)
    base = BASES[name][0]
    expected = PeftModel.from_pretrained(base(), tmp_path)(input_ids=IDS).logits
    model = base()
    plain = model(input_ids=IDS).logits
    assert load(model, tmp_path, "old") == set()
    found = model(input_ids=IDS).logits
    assert not torch.allclose(found, plain, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "how"), [("mixtral", "inject"), ("mixtral", "get"), ("mixtral", "convert"), ("qwen", "inject"), ("qwen", "convert")]
)
def test_an_old_config_is_rewritten(name: str, how: str) -> None:
    """formats.md §7.1: the names leave target_modules, the joint ones enter target_parameters; two side by side have rank 2r and the same scale."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    model, config = BASES[name][0](), config_for(name)
    if how == "inject":
        inject_adapter_in_model(config, model)
    elif how == "get":
        get_peft_model(model, config)
    else:
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    # Qwen's shared expert is made of modules with these names
    left = {"q_proj", "gate_proj", "up_proj", "down_proj"} if name == "qwen" else {"q_proj"}
    assert config.target_modules == left
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 6}
    if how != "convert":
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

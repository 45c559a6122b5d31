"""What becomes of base weights that adapters changed, and of adapters that are dropped, when a model is unloaded or merged."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import MergeError, PeftWarning, get_peft_model
from peft_lora import KasaConfig, LoraConfig


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **fields})


def random(model: nn.Module, adapter: str, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("start", STARTS)
def test_unloading_restores_the_base_or_leaves_the_residual(start: str) -> None:
    model = get_peft_model(net(), lora(**STARTS[start]))
    residual = copy.deepcopy(model.get_base_model()[0].weight)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.unload(restore_base=True)[0].weight, net()[0].weight)
        left = twin.unload(restore_base=False)
    assert torch.equal(left[0].weight, residual)
    assert not torch.equal(residual, net()[0].weight)


def test_one_warning_says_what_was_done() -> None:
    with pytest.warns(PeftWarning, match=r"original weights.*restore_base=False") as told:
        get_peft_model(net(), lora(init_lora_weights="pissa")).unload()
    assert len(told) == 1
    model = get_peft_model(net(), lora(init_lora_weights="pissa"))
    model.restores_base = False
    with pytest.warns(PeftWarning, match=r"stays subtracted.*restore_base=True"):
        model.unload()


def test_nothing_is_said_where_nothing_was_changed_or_all_is_merged() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net(), lora()).unload()
        get_peft_model(net(), lora(init_lora_weights="pissa")).merge_and_unload()


@pytest.mark.parametrize("restore", [True, False])
def test_a_dropped_adapter_that_changed_the_base(restore: bool) -> None:
    model = get_peft_model(net(), lora(), "kept")
    model.add_adapter("dropped", lora(target_modules=["4"], init_lora_weights="pissa"))
    random(model, "kept")
    residual = copy.deepcopy(model.get_base_model()[4].weight)
    merged = model.merge_and_unload(adapter_names=["kept"], restore_base=restore)
    assert torch.equal(merged[4].weight, net()[4].weight if restore else residual)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("r", [2, 1])
def test_a_kasa_is_merged_into_the_base_that_another_truncated(r: int, restore: bool) -> None:
    """Both share the truncated weight; the first, which is dropped, has it under its name."""
    model = get_peft_model(net(), lora(kasa_config=KasaConfig()), "first")
    model.add_adapter("second", lora(r=r, kasa_config=KasaConfig()))
    random(model, "second")
    model.set_adapter("second")
    expected = model(X)
    close(model.merge_and_unload(adapter_names=["second"], restore_base=restore)(X), expected)


def test_tied_embeddings_stay_apart_where_one_of_them_keeps_its_residual() -> None:
    import transformers

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    with pytest.warns(PeftWarning, match="ensure_weight_tying"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights="pissa"))
    with pytest.warns(PeftWarning, match="not tied any more"):
        left = model.unload(restore_base=False)
    assert not torch.equal(left.lm_head.weight, left.model.embed_tokens.weight)
    assert left.config.tie_word_embeddings is False


# ---- layers that were switched one by one ------------------------------------------------------------------------------


def two() -> Any:
    model = get_peft_model(net(), lora(modules_to_save=["4"]), "a")
    model.add_adapter("b", lora(modules_to_save=["4"]))
    random(model, "a")
    random(model, "b", seed=4)
    return model


def switch(model: Any, how: str) -> None:
    layers = model.get_base_model()
    if how == "off":
        layers[2].enable_adapters(False)
    elif how == "none there":
        layers[2].set_adapter(["nobody"])
    elif how == "saved module":
        layers[4].set_adapter("b")
    else:
        layers[2].set_adapter(how.split())


@pytest.mark.parametrize("how", ["b", "b a", "off", "none there", "saved module"])
def test_each_layer_merges_what_it_computes_with(how: str) -> None:
    model = two()
    switch(model, how)
    expected = model(X)
    model.merge_adapter()
    close(model(X), expected)
    model.unmerge_adapter()
    close(model(X), expected)
    close(model.merge_and_unload()(X), expected)


def test_a_saved_module_that_was_switched_stays_when_others_are_unloaded() -> None:
    model = two()
    switch(model, "saved module")
    head = model.get_base_model()[4].modules_to_save["b"]
    assert model.unload()[4] is head


def test_what_is_dropped_is_in_nobodys_way() -> None:
    model = get_peft_model(net(), lora(use_dora=True), "third")
    model.add_adapter("q", lora(use_dora=True))
    random(model, "third", seed=5)
    random(model, "q")
    model.set_adapter("q")
    expected = model(X)
    model.set_adapter(["third", "q"])
    close(model.merge_and_unload(adapter_names=["q"])(X), expected)


def test_a_merge_that_fails_leaves_in_use_what_was() -> None:
    model = two()
    switch(model, "b")
    with torch.no_grad():
        model.get_base_model()[2].lora_A["a"].weight.fill_(float("nan"))
    expected, own = model(X), model.get_base_model()[2].selection
    with pytest.raises(MergeError):
        model.merge_and_unload(adapter_names=["a"], safe_merge=True)
    assert model.active_adapters == ["a"]
    assert model.get_base_model()[2].selection is own
    close(model(X), expected)

"""Methods of the classes of this module that other libraries replace or override: what they do then, and what is only said."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
import peft_core
import peft_lora
from compat.tiny import IDS, llama, outputs, randomise
from peft.tuners.tuners_utils import BaseTuner


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def make(how: str, base: nn.Module, config: Any) -> nn.Module:
    """Add an adapter in one of the ways there are."""
    if how == "get_peft_model":
        return peft.get_peft_model(base, config)
    if how == "inject":
        return peft.inject_adapter_in_model(config, base)
    if how == "class":
        return peft.LoraModel(base, {"default": config}, "default")
    model = peft.get_peft_model(base, lora(target_modules=["o_proj"]), "first")
    model.add_adapter("default", config)
    return model


def wrapped(model: nn.Module) -> set[str]:
    return {name.rpartition("layers.")[2] for name, module in model.named_modules() if getattr(module, "lora_A", None) and "default" in module.lora_A}


WAYS = ["get_peft_model", "inject", "class", "add_adapter"]


@pytest.mark.parametrize("how", WAYS)
def test_a_replaced_create_and_replace_leaves_modules_out(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ms-swift does: what its hook returns None for stays as it is."""
    original, seen = peft.LoraModel._create_and_replace, []

    def hook(self: Any, peft_config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(self).__name__, adapter_name in self.peft_config, args[0], kwargs["current_key"]))
        if target.out_features == 16:  # keys and values
            return None
        return original(self, peft_config, adapter_name, target, *args, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", hook)
    config = lora()
    model = make(how, llama(), config)
    assert wrapped(model) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert ("LoraModel", True, "v_proj", "model.layers.0.self_attn.v_proj") in seen
    assert set(config.target_modules) == {"q_proj", "v_proj"}


def test_a_replaced_create_and_replace_chooses_a_module_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As axolotl and unsloth do for layers that clip the output of a Linear."""

    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).clamp(-1, 1)

    original = peft.LoraModel._create_and_replace

    def hook(self: Any, config: Any, adapter: str, target: Any, name: str, parent: Any, current_key: str, **kwargs: Any) -> Any:
        if isinstance(target, Clipped):
            return original(self, config, adapter, target.linear, "linear", target, current_key=current_key, **kwargs)
        return original(self, config, adapter, target, name, parent, current_key=current_key, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", hook)
    base = nn.ModuleDict({"q": Clipped(), "k": nn.Linear(8, 8)})
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q", "k"]))
    assert isinstance(base["q"].linear, peft_lora.Linear)
    assert isinstance(base["k"], peft_lora.Linear)


def test_a_replaced_check_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BaseTuner._check_target_module_exists
    monkeypatch.setattr(BaseTuner, "_check_target_module_exists", staticmethod(lambda config, key: "layers.1" not in key and original(config, key)))
    assert wrapped(peft.get_peft_model(llama(), lora())) == {"0.self_attn.q_proj", "0.self_attn.v_proj"}


@pytest.mark.parametrize("how", WAYS)
def test_a_replaced_cast_leaves_weights_in_half_precision(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = peft.LoraModel._cast_adapter_dtype

    def hook(self: Any, adapter_name: str, autocast_adapter_dtype: bool = True) -> Any:
        wanted = getattr(self.peft_config[adapter_name], "lora_dtype", None)
        return original(self, adapter_name, autocast_adapter_dtype and wanted is None)

    monkeypatch.setattr(peft.LoraModel, "_cast_adapter_dtype", hook)
    config = lora()
    config.lora_dtype = "bfloat16"
    model = make(how, llama().bfloat16(), config)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name and "default" in name} == {torch.bfloat16}
    model = peft.get_peft_model(llama().bfloat16(), lora())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_a_file_is_not_rounded_on_the_way_to_a_replaced_cast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = randomise(peft.get_peft_model(llama(), lora()))
    expected = peft.get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    original = peft.LoraModel._cast_adapter_dtype
    monkeypatch.setattr(peft.LoraModel, "_cast_adapter_dtype", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    loaded = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in peft.get_peft_model_state_dict(loaded).items())


def test_a_replaced_constructor_finds_the_adapter_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = peft.LoraModel.__init__, []

    def init(self: Any, model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, config, *args, **kwargs)
        layer = self.model.model.layers[0].self_attn.q_proj
        seen.append((self.active_adapter, self.model is model, config[self.active_adapter].r, len(layer.lora_A)))

    monkeypatch.setattr(peft.LoraModel, "__init__", init)
    peft.get_peft_model(llama(), lora())
    assert seen == [("default", True, 4, 1)]


@pytest.mark.parametrize("name", ["_create_new_module", "_replace_module", "_mark_only_adapters_as_trainable"])
def test_what_is_not_called_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.LoraModel, name, lambda *args, **kwargs: None)
    with pytest.warns(peft.PeftWarning, match=f"'{name}' of LoraModel were replaced and are not called"):
        peft.get_peft_model(llama(), lora())


def test_nothing_is_said_where_nothing_was_replaced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(llama(), lora())


def test_a_seam_by_itself_says_who_calls_it() -> None:
    model = peft.get_peft_model(llama(), lora()).base_model
    with pytest.raises(peft_core.CapabilityError, match="called by injection"):
        model._create_and_replace(None, "default", nn.Linear(1, 1), "", None, "")
    with pytest.raises(peft_core.CapabilityError, match="peft_make_layer"):
        model._create_new_module(None, "default", nn.Linear(1, 1))


def test_a_failed_hook_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", fail)
    base = llama()
    before = set(base.state_dict())
    with pytest.raises(RuntimeError, match="no"):
        peft.get_peft_model(base, lora())
    assert set(base.state_dict()) == before
    monkeypatch.undo()
    peft.get_peft_model(base, lora())


def test_a_class_of_ones_own_takes_the_place_of_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(peft.LoraModel):
        def _create_and_replace(self, config: Any, adapter: str, target: Any, *args: Any, **kwargs: Any) -> None:
            if target.out_features != 16:
                super()._create_and_replace(config, adapter, target, *args, **kwargs)

    monkeypatch.setitem(peft.PEFT_TYPE_TO_TUNER_MAPPING, "LORA", Mine)
    model = peft.get_peft_model(llama(), lora())
    assert type(model.base_model) is Mine
    assert wrapped(model) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert not isinstance(peft_core.get_peft_model(llama(), lora()).base_model, Mine)


def test_merging_is_that_of_the_tuner_class(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = BaseTuner._unload_and_optionally_merge, []

    def unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("merge", True))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unload)
    model = randomise(peft.get_peft_model(llama(), lora()))
    expected = outputs(model)
    assert float((outputs(model.merge_and_unload()) - expected).abs().max()) < 1e-5
    peft.get_peft_model(llama(), lora()).unload()
    assert seen == [True, False]


def test_models_of_both_modules_are_instances() -> None:
    ours, core = peft.get_peft_model(llama(), lora()), peft_core.get_peft_model(llama(), lora())
    for model in (ours, core):
        assert isinstance(model, peft.PeftModel)
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert not isinstance(model, peft.PeftModelForSeq2SeqLM)
        assert isinstance(model.base_model, peft.LoraModel)
        assert isinstance(model.base_model, peft_lora.LoraModel)
        assert isinstance(model.base_model, BaseTuner)
        assert not isinstance(model.base_model, peft.LoHaModel)
    assert type(core.base_model) is peft_core.TunerModel
    assert type(peft_lora.LoraModel(llama(), lora())) is peft_lora.LoraModel


def test_copies_and_pickles_keep_their_class() -> None:
    model = randomise(peft.get_peft_model(llama(), lora()))
    expected = outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.base_model) is peft.LoraModel
        assert torch.equal(outputs(twin), expected)
        twin.add_adapter("other", lora())
        assert twin.base_model.peft_config is not model.base_model.peft_config
    assert list(model.peft_config) == ["default"]


def test_a_class_derived_from_a_task_class_is_an_ordinary_one() -> None:
    class Mine(peft.PeftModelForCausalLM):  # type: ignore[misc]
        pass

    model = Mine(llama(), lora())
    assert isinstance(model, Mine)
    assert not isinstance(peft.get_peft_model(llama(), lora()), Mine)
    assert issubclass(Mine, peft.PeftModel)
    assert model(input_ids=IDS).logits.shape[-1] == 64

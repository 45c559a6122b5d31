"""Adapters of a model: added, chosen, switched off, deleted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
from peft_core import (
    AdapterNameError,
    AdapterNotFoundError,
    MergeError,
    PeftModel,
    PeftModelForSequenceClassification,
    PeftWarning,
    get_peft_model,
)
from support import CueConfig, DenseConfig, dense


@pytest.fixture
def model() -> PeftModel:
    """Adapters a (active), b and c."""
    model = get_peft_model(support.net(), dense(), "a")
    model.add_adapter("b", dense())
    model.add_adapter("c", dense())
    return model.eval()


def flags(model: PeftModel) -> dict[str, bool]:
    """Adapter → whether its parameters train; they must agree."""
    found: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        for adapter in set(name.split(".")) & set(model.peft_config):
            found.setdefault(adapter, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values())
    return {adapter: values.pop() for adapter, values in found.items()}


def base_trains(model: PeftModel) -> bool:
    return any(p.requires_grad for name, p in model.named_parameters() if not set(name.split(".")) & set(model.peft_config))


X = support.features()


# ---- adding -----------------------------------------------------------------------------------------------------------


def test_the_base_is_frozen_and_the_adapter_trains() -> None:
    model = get_peft_model(support.net(), dense(), "a")
    assert flags(model) == {"a": True}
    assert not base_trains(model)


def test_an_adapter_for_inference_is_frozen() -> None:
    assert flags(get_peft_model(support.net(), dense(inference_mode=True), "a")) == {"a": False}


def test_the_config_is_kept_not_copied() -> None:
    config = dense()
    assert get_peft_model(support.net(), config).peft_config["default"] is config


def test_the_base_is_wrapped_in_place() -> None:
    base = support.net()
    model = get_peft_model(base, dense())
    assert model.get_base_model() is base
    assert model.base_model.model is base


def test_an_added_adapter_is_neither_active_nor_trainable(model: PeftModel) -> None:
    assert model.active_adapters == ["a"]
    assert flags(model) == {"a": True, "b": False, "c": False}


def test_a_new_adapter_changes_nothing() -> None:
    base = support.net()
    expected = base(X)
    assert torch.equal(get_peft_model(base, dense(start="zero"))(X), expected)


def test_adding_leaves_the_flags_of_others(model: PeftModel) -> None:
    model.set_requires_grad("a", False)
    model.set_requires_grad("b", True)
    model.add_adapter("d", dense())
    assert flags(model) == {"a": False, "b": True, "c": False, "d": False}


def test_wrapping_a_wrapped_base_again_is_warned_about() -> None:
    base = support.net()
    get_peft_model(base, dense(), "a")
    with pytest.warns(PeftWarning, match="already has adapters"):
        again = get_peft_model(base, dense(), "b")
    assert list(again.peft_config) == ["a", "b"]


def test_a_task_selects_the_class() -> None:
    model = get_peft_model(support.bert_classifier(), DenseConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert type(model) is PeftModelForSequenceClassification
    assert model.cls_layer_name == "classifier"


def test_a_revision_is_noted_and_another_one_is_warned_about() -> None:
    config = dense()
    get_peft_model(support.net(), config, revision="v1")
    assert config.revision == "v1"
    with pytest.warns(PeftWarning, match="already set base model revision to v1, overwriting with revision v2"):
        get_peft_model(support.net(), config, revision="v2")


def test_pretraining_tp_is_switched_off() -> None:
    base = support.llama()
    base.config.pretraining_tp = 2
    get_peft_model(base, DenseConfig())
    assert base.config.pretraining_tp == 1


def test_inputs_require_grad_under_gradient_checkpointing() -> None:
    base = support.llama()
    base.gradient_checkpointing_enable()
    model = get_peft_model(base, DenseConfig()).train()
    model(input_ids=support.IDS, labels=support.IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_unknown_attributes_are_those_of_the_base(model: Any) -> None:
    model.get_base_model().colour = "red"
    assert model.colour == "red"
    with pytest.raises(AttributeError):
        _ = model.flavour


# ---- names ------------------------------------------------------------------------------------------------------------


def test_a_taken_name_is_refused(model: PeftModel) -> None:
    with support.Unchanged(model), pytest.raises(AdapterNameError, match="'a' already exists") as caught:
        model.add_adapter("a", dense())
    assert caught.value.code == "name-taken"


@pytest.mark.parametrize(
    "name",
    ["", "x.y", "__base__", "keys", "items", "forward", "training", "_modules", "_parameters", "_buffers", "named_parameters", "T_destination"],
)
def test_a_name_that_can_be_no_key_is_refused(name: str) -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(AdapterNameError, match="name"):
        get_peft_model(base, dense(), name)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_a_name_is_a_string(name: Any) -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(AdapterNameError, match="is not an adapter name"):
        get_peft_model(base, dense(), name)


@pytest.mark.parametrize("name", ["/a", "a/", "a//b", "/", "..", "../a", "a/../b", "a\\b", "a\0"])
def test_a_name_that_is_no_folder_inside_is_refused(name: str) -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(AdapterNameError, match="name"):
        get_peft_model(base, dense(), name)


@pytest.mark.parametrize(
    "name", ["b", "a b", "été", "default", "x-1", "DENSE", "weight", "self", "adense", "1", "dense_", "dense_delta", "dense_x", "a/b", "a/b/c"]
)
def test_other_names_work(name: str, tmp_path: Any) -> None:
    model = get_peft_model(support.net(), dense(), name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    again = PeftModel.from_pretrained(support.net(), folder, name)
    assert torch.equal(again(X), model.eval()(X))


# ---- choosing ---------------------------------------------------------------------------------------------------------


def test_set_adapter_makes_one_active_and_trainable(model: PeftModel) -> None:
    model.set_adapter("b")
    assert model.active_adapter == "b"
    assert flags(model) == {"a": False, "b": True, "c": False}


def test_set_adapter_changes_what_is_computed(model: PeftModel) -> None:
    first = model(X)
    model.set_adapter("b")
    assert not torch.equal(model(X), first)
    model.set_adapter("a")
    assert torch.equal(model(X), first)


def test_set_adapter_for_inference_trains_nothing(model: PeftModel) -> None:
    model.set_adapter("b", inference_mode=True)
    assert flags(model) == {"a": False, "b": False, "c": False}


def test_several_adapters_add_up(model: PeftModel) -> None:
    layer: Any = model.get_base_model().last
    plain = layer.base_layer(X)
    deltas = {}
    for name in ("a", "c"):
        model.set_adapter(name)
        deltas[name] = layer(X) - plain
    model.set_adapter(["a", "c"])
    torch.testing.assert_close(layer(X), plain + deltas["a"] + deltas["c"])
    assert flags(model) == {"a": True, "b": False, "c": True}


def test_several_adapters_are_in_the_order_given(model: PeftModel) -> None:
    model.set_adapter(["c", "a", "c"])
    assert model.active_adapters == ["c", "a"]
    assert model.active_adapter == ["c", "a"]
    assert all(layer.active_adapters == ["c", "a"] for layer in model.get_layer_status())
    model.add_adapter("d", dense())
    model.delete_adapter("c")
    assert model.active_adapters == ["a"]


def test_an_unknown_name_is_refused_with_the_nearest(model: PeftModel) -> None:
    model.add_adapter("french", dense())
    with support.Unchanged(model), pytest.raises(AdapterNotFoundError, match=r"Adapter 'frnch' not found.*did you mean 'french'"):
        model.set_adapter("frnch")


def test_set_adapter_while_merged_unmerges_with_one_warning(model: Any) -> None:
    weight = model.get_base_model().last.weight.clone()
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="Unmerging the model first") as caught:
        model.set_adapter("b")
    assert len(caught) == 1
    assert torch.equal(model.get_base_model().last.weight, weight)


def test_set_requires_grad_is_independent_of_activity(model: PeftModel) -> None:
    model.set_requires_grad("b")
    model.set_requires_grad(["a"], False)
    assert flags(model) == {"a": False, "b": True, "c": False}
    assert model.active_adapters == ["a"]


def test_merge_adapter_takes_a_name_or_a_list(model: Any) -> None:
    model.merge_adapter("b")
    assert model.get_base_model().last.merged_adapters == ["b"]
    model.unmerge_adapter()
    model.merge_adapter(["b", "c"])
    assert model.get_base_model().last.merged_adapters == ["b", "c"]


def test_merging_twice_is_one_warning(model: PeftModel) -> None:
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="already merged") as caught:
        model.merge_adapter()
    assert len(caught) == 1


def test_unmerging_nothing_is_one_warning(model: PeftModel) -> None:
    with pytest.warns(PeftWarning, match="Already unmerged") as caught:
        model.unmerge_adapter()
    assert len(caught) == 1


# ---- switching off ----------------------------------------------------------------------------------------------------


def test_disabled_the_model_is_the_base(model: PeftModel) -> None:
    expected = support.net()(X)
    adapted = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), adapted)


def test_disabled_heads_are_the_original_ones() -> None:
    model = get_peft_model(support.net(), dense(modules_to_save=["head"])).eval()
    support.randomise(model, "default")
    with model.disable_adapter():
        assert torch.equal(model(X), support.net()(X))


def test_disabled_virtual_tokens_are_not_there() -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with model.disable_adapter():
        assert torch.equal(model(support.IDS).logits, support.llama()(support.IDS).logits)
        assert torch.equal(
            model.generate(input_ids=support.IDS, max_new_tokens=3, do_sample=False),
            support.llama().generate(input_ids=support.IDS, max_new_tokens=3, do_sample=False),
        )


def test_disabling_keeps_the_flags_that_the_user_set(model: PeftModel) -> None:
    model.set_requires_grad("a", False)
    model.set_requires_grad("c", True)
    with model.disable_adapter():
        pass
    assert flags(model) == {"a": False, "b": False, "c": True}


def test_disabling_ends_when_the_block_raises(model: PeftModel) -> None:
    adapted = model(X)
    with pytest.raises(RuntimeError, match="oops"), model.disable_adapter():
        raise RuntimeError("oops")
    assert torch.equal(model(X), adapted)


def test_nested_disabling_ends_with_the_outermost(model: PeftModel) -> None:
    expected = support.net()(X)
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(model(X), expected)
    assert not torch.equal(model(X), expected)


def test_adapters_that_were_switched_off_before_stay_off_afterwards(model: PeftModel) -> None:
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(X), support.net()(X))


def test_merged_adapters_are_taken_out_and_stay_out(model: Any) -> None:
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), support.net()(X))
    assert not model.get_base_model().last.merged


def test_has_active_enabled_adapter(model: PeftModel) -> None:
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter
    model.enable_adapter_layers()
    assert model.has_active_enabled_adapter


def test_names_for_rows_mean_the_base_while_disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=["a", "b", "__base__"]), support.net()(X))


# ---- deleting ---------------------------------------------------------------------------------------------------------


def test_deleting_an_inactive_adapter_changes_nothing_else(model: PeftModel) -> None:
    expected = model(X)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["a", "c"]
    assert not any("b" in name.split(".") for name in model.state_dict())
    assert torch.equal(model(X), expected)
    assert flags(model) == {"a": True, "c": False}


def test_deleting_the_active_adapter_activates_the_first_that_remains_with_one_warning(model: PeftModel) -> None:
    with pytest.warns(PeftWarning, match="'a' was deleted; 'b' is active now") as caught:
        model.delete_adapter("a")
    assert len(caught) == 1
    assert model.active_adapters == ["b"]
    assert flags(model) == {"b": True, "c": False}


def test_other_active_adapters_stay_active(model: PeftModel) -> None:
    model.set_adapter(["a", "c"])
    model.delete_adapter("a")
    assert model.active_adapters == ["c"]


def test_deleting_the_last_adapter_leaves_the_base(model: PeftModel) -> None:
    model.set_adapter("c")
    for name in ("a", "b", "c"):
        model.delete_adapter(name)
    assert model.active_adapters == []
    assert model.active_adapter is None
    assert torch.equal(model(X), support.net()(X))
    assert model.get_model_status().available_adapters == []
    with pytest.raises(ValueError, match="no adapter is active"):
        _ = model.active_peft_config


def test_deleting_the_last_virtual_tokens_leaves_the_base() -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.delete_adapter("default")
    assert torch.equal(model(support.IDS).logits, support.llama()(support.IDS).logits)


def test_a_deleted_name_can_be_used_again(model: PeftModel) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", dense(target_modules=["down"]))
    model.set_adapter("b")
    assert flags(model)["b"]


def test_a_merged_adapter_can_not_be_deleted(model: PeftModel) -> None:
    model.merge_adapter()
    with support.Unchanged(model), pytest.raises(MergeError, match=r"cannot delete the adapter 'a' while it is merged.*unmerge"):
        model.delete_adapter("a")


def test_an_unknown_adapter_can_not_be_deleted(model: PeftModel) -> None:
    with support.Unchanged(model), pytest.raises(AdapterNotFoundError, match="'z' not found"):
        model.delete_adapter("z")


# ---- unloading --------------------------------------------------------------------------------------------------------


def test_unload_returns_the_base_as_it_was(model: PeftModel) -> None:
    base = model.get_base_model()
    assert model.unload() is base
    assert torch.equal(base(X), support.net()(X))
    assert {name: type(module) for name, module in base.named_modules()} == {name: type(module) for name, module in support.net().named_modules()}
    assert not hasattr(base, "peft_config")


def test_merge_and_unload_returns_the_base_that_computes_as_adapted(model: PeftModel) -> None:
    base, expected = model.get_base_model(), model(X)
    assert model.merge_and_unload() is base
    torch.testing.assert_close(base(X), expected)
    assert type(base.last) is torch.nn.Linear


def test_an_unloaded_base_can_be_adapted_again(model: PeftModel) -> None:
    base = model.unload()
    again = get_peft_model(base, dense(), "a")
    assert flags(again) == {"a": True}

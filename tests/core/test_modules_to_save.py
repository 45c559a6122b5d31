"""`modules_to_save`: modules of the base that are trained and saved as whole copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from peft_core import ConfigError, PeftModel, UnsupportedModuleError, get_peft_model, get_peft_model_state_dict
from support import CueConfig, DenseConfig

X = support.features()


def dense(**fields: Any) -> DenseConfig:
    return DenseConfig(**{"target_modules": ["up"], "modules_to_save": ["head"], "start": "random", **fields})


@pytest.fixture
def model() -> PeftModel:
    """Adapters a and b with different heads."""
    model = get_peft_model(support.net(), dense(), "a")
    model.add_adapter("b", dense())
    support.randomise(model, "a", seed=1)
    support.randomise(model, "b", seed=2)
    return model.eval()


def test_the_copy_starts_as_the_original() -> None:
    base = support.net()
    get_peft_model(base, dense(), "a")
    copied, original = base.head.modules_to_save["a"], base.head.original_module
    assert torch.equal(copied.weight, original.weight)
    assert copied.weight is not original.weight


def test_the_copy_trains_and_the_original_is_frozen(model: PeftModel) -> None:
    head: Any = model.get_base_model().head
    assert head.modules_to_save["a"].weight.requires_grad
    assert not head.original_module.weight.requires_grad


def test_trainability_follows_set_adapter(model: PeftModel) -> None:
    head: Any = model.get_base_model().head
    model.set_adapter("b")
    assert [head.modules_to_save[name].weight.requires_grad for name in ("a", "b")] == [False, True]
    model.set_adapter("b", inference_mode=True)
    assert not head.modules_to_save["b"].weight.requires_grad


def test_the_copy_of_the_active_adapter_is_used(model: PeftModel) -> None:
    head: Any = model.get_base_model().head
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(head(X), head.modules_to_save[name](X))


def test_an_adapter_without_a_copy_uses_the_original(model: PeftModel) -> None:
    model.add_adapter("c", dense(modules_to_save=None))
    model.set_adapter("c")
    head: Any = model.get_base_model().head
    assert torch.equal(head(X), head.original_module(X))


def test_only_the_copy_learns(model: PeftModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).sum().backward()
    optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("a" in name.split(".") for name in changed)


def test_each_row_sees_its_own_copy(model: PeftModel) -> None:
    mixed = model(X, adapter_names=["b", "__base__", "a"])
    for row, name in ((0, "b"), (2, "a")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(X)[row])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(X)[1])


def test_attributes_are_those_of_the_copy_in_use(model: PeftModel) -> None:
    head: Any = model.get_base_model().head
    assert head.weight is head.modules_to_save["a"].weight
    assert head.out_features == 2


# ---- which modules ----------------------------------------------------------------------------------------------------


def test_a_name_matches_whole_segments_only() -> None:
    base = support.net()
    base.overhead, base.lm_head = nn.Linear(4, 4), nn.Linear(4, 4)
    get_peft_model(base, dense())
    assert [type(module) for module in (base.overhead, base.lm_head)] == [nn.Linear, nn.Linear]
    assert type(base.head).__name__ == "ModulesToSaveWrapper"


def test_every_module_of_that_name_is_saved() -> None:
    model = get_peft_model(support.net(), dense(modules_to_save=["down"]))
    assert {key for key in get_peft_model_state_dict(model) if ".down." in key} == {
        f"base_model.model.layers.{i}.down.{what}" for i in (0, 1) for what in ("weight", "bias")
    }


def test_a_whole_block_is_saved_with_all_its_tensors() -> None:
    base = support.net()
    base.layers[0].register_buffer("count", torch.zeros(1))
    model = get_peft_model(base, dense(modules_to_save=["layers.0"], target_modules=["last"]))
    keys = {key.removeprefix("base_model.model.layers.0.") for key in get_peft_model_state_dict(model) if ".layers.0." in key}
    assert keys == {"count", "up.weight", "up.bias", "down.weight", "down.bias", "norm.weight", "norm.bias"}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match=r"modules_to_save: 'haed' match(es)? no module of Net; did you mean 'head'"):
        get_peft_model(base, dense(modules_to_save=["haed"]))


def test_a_list_of_modules_can_not_be_replaced() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(UnsupportedModuleError, match=r"'layers' is a ModuleList.*name the modules inside it"):
        get_peft_model(base, dense(modules_to_save=["layers"], target_modules=["last"]))


def test_heads_of_the_task_are_saved_without_being_named() -> None:
    base = support.bert_classifier()
    model = get_peft_model(base, DenseConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(get_peft_model_state_dict(model))
    assert {"classifier", "score"} <= (model.modules_to_save or set())


def test_the_users_list_is_not_changed() -> None:
    names = ["classifier"]
    config = DenseConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=names)
    model = get_peft_model(support.bert_classifier(), config)
    model.add_adapter("b", DenseConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=names))
    assert names == ["classifier"]


def test_a_virtual_token_tuner_can_save_a_head(tmp_path: Path) -> None:
    config = CueConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    model = get_peft_model(support.bert_classifier(), config).eval()
    support.randomise(model, "default")
    assert set(get_peft_model_state_dict(model)) == {"cue_table", "base_model.classifier.weight", "base_model.classifier.bias"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(support.bert_classifier(), tmp_path)
    assert torch.equal(again(support.IDS).logits, model(support.IDS).logits)


# ---- beside other adapters --------------------------------------------------------------------------------------------


def test_a_copy_beside_an_adapter_on_the_same_module_holds_the_original_alone() -> None:
    """Refused, or clean keys: never another adapter's weights inside the copy."""
    model = get_peft_model(support.net(), dense(target_modules=["head"], modules_to_save=None), "a")
    try:
        model.add_adapter("b", dense())
    except ValueError:
        return
    keys = {key for key in get_peft_model_state_dict(model, adapter_name="b") if ".head." in key}
    assert keys == {"base_model.model.head.weight", "base_model.model.head.bias"}
    model.set_adapter("a")
    assert not torch.equal(model(X), support.net()(X))


def test_a_copy_of_a_block_holds_no_adapter_of_another() -> None:
    model = get_peft_model(support.net(), dense(target_modules=["0.up"], modules_to_save=None), "a")
    try:
        model.add_adapter("b", dense(target_modules=["last"], modules_to_save=["layers.0"]))
    except ValueError:
        return
    keys = {key for key in get_peft_model_state_dict(model, adapter_name="b") if ".layers.0.up" in key}
    assert keys == {"base_model.model.layers.0.up.weight", "base_model.model.layers.0.up.bias"}


# ---- taking off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_the_copy_in_use_stays_in_the_base(model: Any, method: str) -> None:
    model.set_adapter("b")
    weight = model.get_base_model().head.modules_to_save["b"].weight.clone()
    base = getattr(model, method)()
    assert type(base.head) is nn.Linear
    assert torch.equal(base.head.weight, weight)


def test_merge_and_unload_of_a_named_adapter_leaves_its_copy(model: Any) -> None:
    weight = model.get_base_model().head.modules_to_save["b"].weight.clone()
    assert torch.equal(model.merge_and_unload(adapter_names=["b"]).head.weight, weight)


def test_deleting_the_adapter_deletes_the_copy(model: Any) -> None:
    model.delete_adapter("b")
    assert list(model.get_base_model().head.modules_to_save) == ["a"]

"""Layers that are given a choice of adapters by themselves, by whoever visits the layers of a model and not the model as a whole."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    AdapterLayer,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    MergeError,
    ModelError,
    ModulesToSaveWrapper,
    PeftModel,
    delete_adapter,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_core.testing.helpers import randomise
from support import DenseConfig, dense

X = support.features()
HEAD = {"modules_to_save": ["head"]}


def two(**fields: Any) -> nn.Module:
    torch.manual_seed(1)
    model = inject_adapter_in_model(dense(**fields), support.net(), "a")
    return inject_adapter_in_model(dense(**fields), model, "b").eval()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def switch(model: nn.Module, names: Any, **options: Any) -> Tensor:
    for layer in (*layers(model), *wrappers(model)):
        layer.set_adapter(names, **options)
    return model(X)


def trains(model: nn.Module) -> set[str]:
    return {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".") if part in ("a", "b")}


def test_the_adapter_that_was_injected_last_is_in_use() -> None:
    model = two()
    assert [layer.active_adapters for layer in layers(model)] == [["b"]] * 3
    assert trains(model) == {"a", "b"}
    inject_adapter_in_model(dense(), alone := support.net(), "b")
    for mine, other in zip(layers(alone), layers(model), strict=True):
        mine.dense_delta["b"].data.copy_(other.dense_delta["b"])
    assert torch.equal(alone(X), model(X))


def test_one_two_and_no_adapter() -> None:
    model = two()
    base = support.net()(X)
    a, b, both, none = (switch(model, names) for names in ("a", "b", ["a", "b"], []))
    assert torch.equal(none, base)
    assert len({tuple(x.flatten().tolist()) for x in (a, b, both, base)}) == 4
    torch.testing.assert_close(switch(model, ["b", "a"]), both)


@pytest.mark.parametrize("given", ["a", ["a"], ["a", "b"], ["b", "a"], ["nobody"], []])
def test_the_choice_is_shown_as_a_list_in_the_order_given(given: Any) -> None:
    """diffusers reads `active_adapter` of layers and takes it for a list, as it is on the reference implementation."""
    model = two()
    switch(model, given)
    for layer in layers(model):
        assert layer.active_adapter == layer.active_adapters == ([given] if isinstance(given, str) else given)


def test_a_name_without_weights_here_has_no_effect() -> None:
    model = two()
    assert torch.equal(switch(model, "nobody"), support.net()(X))
    assert not trains(model)


def test_what_is_in_use_trains_and_the_rest_is_frozen() -> None:
    model = two(**HEAD)
    switch(model, "a")
    assert trains(model) == {"a"}
    switch(model, ["b", "a"])
    assert trains(model) == {"a", "b"}
    switch(model, "b", inference_mode=True)
    assert not trains(model)
    layers(model)[0].set_requires_grad("a")
    assert sum(p.requires_grad for p in model.parameters()) == 1
    layers(model)[0].set_requires_grad(["a", "nobody"], False)
    assert not trains(model)


def test_layers_differ() -> None:
    model = two()
    first, *rest = layers(model)
    first.set_adapter("a")
    assert [layer.active_adapter for layer in layers(model)] == [["a"], ["b"], ["b"]]
    assert first.selection is not rest[0].selection is rest[1].selection
    for layer in rest:
        layer.set_adapter("a")
    assert len({id(layer.selection) for layer in layers(model)}) == 1, "layers in one state share what they follow"


def test_switching_off_and_on_leaves_what_trains() -> None:
    model = two(**HEAD)
    expected = switch(model, "a")
    for layer in (*layers(model), *wrappers(model)):
        layer.enable_adapters(enabled=False)
        assert layer.disable_adapters
    assert torch.equal(model(X), support.net()(X))
    assert trains(model) == {"a"}
    for layer in layers(model):  # saved modules come with them
        layer.enable_adapters(enabled=True)
    assert not any(layer.disable_adapters for layer in (*layers(model), *wrappers(model)))
    assert torch.equal(model(X), expected)


def test_disabling_the_model_disables_layers_that_were_switched() -> None:
    model: Any = get_peft_model(support.net(), dense(), "a")
    model.add_adapter("b", dense())
    for name in "ab":
        randomise(model, name, ord(name))
    first, *_ = layers(model)
    first.set_adapter("b")
    mixed = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), support.net()(X))
        first.set_adapter("a")
        assert torch.equal(model(X), support.net()(X))
        with model.disable_adapter():
            assert torch.equal(model(X), support.net()(X))
        assert torch.equal(model(X), support.net()(X))
        first.set_adapter("b")
    assert torch.equal(model(X), mixed)


def test_switching_off_takes_out_what_is_merged() -> None:
    model = two()
    for layer in layers(model):
        layer.merge()
        assert layer.merged
        layer.enable_adapters(False)
        assert not layer.merged
    assert torch.equal(model(X), support.net()(X))


def test_merging_a_layer() -> None:
    model = two()
    expected = model(X)
    last = layers(model)[-1]
    before = last.get_base_weight().clone()
    last.merge(safe_merge=True, adapter_names=["b"])
    assert last.merged_adapters == ["b"]
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(MergeError, match="cannot delete the adapter 'b' while it is merged"):
        last.delete_adapter("b")
    with pytest.raises(MergeError, match="merged into the base weight"):
        last.set_base_weight(before)
    last.unmerge()
    last.unmerge()
    assert torch.equal(last.get_base_weight(), before)


def test_the_base_weight_can_be_written() -> None:
    last = layers(two())[-1]
    delta = last.get_delta_weight("b")
    parameter = last.get_base_weight()
    last.set_base_weight(parameter + delta)
    assert last.get_base_weight() is parameter
    with pytest.raises(ModelError, match=r"shape \(\d+, \d+\), and the given one \(1, 1\)"):
        last.set_base_weight(torch.zeros(1, 1))


def test_deleting_layer_by_layer() -> None:
    model = two(**HEAD)
    switch(model, "b")
    expected = switch(model, "a").clone()
    switch(model, "b")
    for layer in (*layers(model), *wrappers(model)):
        layer.delete_adapter("nobody")
        layer.delete_adapter("b")
        assert layer.active_adapters == ["a"]
    assert torch.equal(model(X), expected)
    assert not any("b" in name.split(".") for name, _ in model.named_parameters())
    for layer in (*layers(model), *wrappers(model)):
        layer.delete_adapter("a")
    assert torch.equal(model(X), support.net()(X))


def test_deleting_from_a_model_whose_layers_were_switched() -> None:
    model = two()
    switch(model, "a")
    delete_adapter(model, "a")
    assert [layer.active_adapter for layer in layers(model)] == [["b"]] * 3
    switch(model, [])
    delete_adapter(model, "b")
    assert torch.equal(model(X), support.net()(X))


@pytest.mark.parametrize("how", ["set_adapter", "enable_adapter_layers"])
def test_the_model_takes_its_layers_back(how: str) -> None:
    model = get_peft_model(support.net(), dense(), "a")
    model.add_adapter("b", dense())
    model.eval()
    expected = model(X)
    for layer in layers(model):
        layer.set_adapter("b")
        layer.enable_adapters(False)
    if how == "set_adapter":
        model.set_adapter("a")
    else:
        model.enable_adapter_layers()
    assert torch.equal(model(X), expected)


def test_rows_of_a_call_are_followed_by_layers_that_were_switched() -> None:
    model = get_peft_model(support.net(), dense(), "a").eval()
    expected = model(X)
    layers(model)[0].enable_adapters(False)
    assert not torch.equal(model(X), expected)
    assert torch.equal(model(X, adapter_names=["a"] * len(X)), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_switched_as_the_original_is(how: str) -> None:
    model = two(**HEAD)
    expected = switch(model, "a")
    for layer in (*layers(model), *wrappers(model)):
        layer.enable_adapters(False)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(X), support.net()(X))
    for layer in layers(twin):
        layer.enable_adapters(True)
    assert torch.equal(twin(X), expected)
    assert torch.equal(model(X), support.net()(X)), "the original stays as it was"
    assert len({id(layer.selection.root) for layer in (*layers(twin), *wrappers(twin))}) == 1
    assert not {id(m.selection) for m in (*layers(twin), *wrappers(twin))} & {id(m.selection) for m in (*layers(model), *wrappers(model))}


def test_an_adapter_that_comes_later_has_a_number_for_all() -> None:
    model = two()
    switch(model, "a")
    inject_adapter_in_model(dense(), model, "c")
    switch(model, "c")
    selection = layers(model)[0].selection
    assert selection.active_mask.tolist() == [False, False, True]


def test_wrappers_that_somebody_else_took_off() -> None:
    model: Any = two()
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterLayer)]:
        model.set_submodule(name, layer.get_base_layer())
    model.peft_config.clear()
    del model.peft_config
    inject_adapter_in_model(dense(), model, "a")
    assert len(layers(model)) == 3
    assert not torch.equal(model(X), support.net()(X))


# ---- kinds ------------------------------------------------------------------------------------------------------------


def test_kinds_of_modules() -> None:
    model = get_peft_model(support.llama(), dense(target_modules=["q_proj"], modules_to_save=["norm"]))
    for layer in layers(model):
        assert isinstance(layer, AdapterLayer)
        assert not isinstance(layer, AuxiliaryTrainingWrapper)
        assert layer.adapter_layer_names == ("dense_delta",)
    (saved,) = wrappers(model)
    assert isinstance(saved, AuxiliaryTrainingWrapper)
    assert not isinstance(saved, BaseTunerLayer)
    assert not isinstance(nn.Linear(1, 1), BaseTunerLayer)


def test_rows_of_tokens_are_auxiliary_and_hold_a_layer() -> None:
    model = two_rows()
    rows: Any = model.get_input_embeddings()
    assert isinstance(rows, AuxiliaryTrainingWrapper)
    assert not isinstance(rows, BaseTunerLayer)
    assert isinstance(rows.token_adapter, BaseTunerLayer)
    assert rows.adapter_state_dict_load_map("default") == {
        "token_adapter.trainable_tokens_delta": "token_adapter.trainable_tokens_delta.default",
    }
    assert rows.adapter_state_dict_load_map("nobody") == {}
    found = rows.adapter_state_dict("default", rows.state_dict())
    assert torch.equal(found["token_adapter.trainable_tokens_delta"], model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"])


def two_rows() -> Any:
    @support.dataclass
    class RowsConfig(DenseConfig):
        def shared_options(self) -> Any:
            return support.SharedOptions(token_indices=[1, 2])

    model: Any = inject_adapter_in_model(RowsConfig(target_modules=["q_proj"]), support.llama()).eval()
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].fill_(0.5)
    return model


def test_rows_are_switched_through_the_layer_that_they_hold() -> None:
    model = two_rows()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected, plain = model(ids).logits, support.llama()(ids).logits
        part = model.get_input_embeddings().token_adapter
        for layer in layers(model):
            layer.enable_adapters(enabled=False)
        assert torch.equal(model(ids).logits, plain)
        for layer in layers(model):
            layer.enable_adapters(enabled=True)
        assert torch.equal(model(ids).logits, expected)
        part.set_adapter("nobody")
        assert not part.trainable_tokens_delta["default"].requires_grad
        assert part.active_adapters == model.get_input_embeddings().active_adapters == ["nobody"]
        assert torch.equal(model(ids).logits, plain)
        part.set_adapter(["default"])
        assert torch.equal(model(ids).logits, expected)
        part.merge()
        assert part.merged
        torch.testing.assert_close(model(ids).logits, expected)
        part.unmerge()
        assert torch.equal(model(ids).logits, expected)


def test_the_weight_of_trained_rows_is_what_a_product_by_hand_needs() -> None:
    rows = two_rows().get_input_embeddings()
    weight = rows.weight
    assert (weight[[1, 2]] == 0.5).all()
    weight.sum().backward()
    assert (rows.token_adapter.trainable_tokens_delta["default"].grad == 1).all()
    rows.enable_adapters(False)
    assert rows.weight is rows.get_base_weight()


def test_keys_of_saved_modules() -> None:
    model: PeftModel = get_peft_model(support.net(), dense(**HEAD))
    (saved,) = wrappers(model)
    assert saved.adapter_state_dict_load_map("default") == {"weight": "modules_to_save.default.weight", "bias": "modules_to_save.default.bias"}
    found = saved.adapter_state_dict("default", saved.state_dict())
    assert torch.equal(found["weight"], saved.modules_to_save["default"].weight)
    with pytest.raises(KeyError):
        saved.adapter_state_dict("default", {})


@pytest.mark.filterwarnings("ignore:the model already has adapters")
def test_a_base_without_wrappers_keeps_what_stands_beside_it() -> None:
    """A prompt's model has none, and goes on when its last adapter is deleted and another one comes."""
    model = get_peft_model(support.llama(), support.CueConfig(num_virtual_tokens=2), "a")
    model.delete_adapter("a")
    get_peft_model(model.get_base_model(), support.CueConfig(num_virtual_tokens=3), "b")
    assert list(model.peft_config) == ["b"]

"""§9: modules that are saved whole, and rows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from page.making import (
    SORTS,
    PeftModel,
    config,
    fresh,
    get_peft_config,
    get_peft_model,
    made,
    over,
    parameters_of,
    randomise,
    refused,
    run,
    same,
    tiny,
)
from peft_core import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

HEAD: dict[str, Any] = {"modules_to_save": ["lm_head"]}


def _head(model: Any) -> Any:
    return model.get_base_model().lm_head


# ---- modules_to_save -------------------------------------------------------------------------------------------------
@over(*SORTS)
def wrapper_holds_the_original_and_copies(kind: str) -> None:
    base = tiny()
    original = base.lm_head
    wrapper = _head(get_peft_model(base, config(kind, **HEAD), "a"))
    assert type(wrapper) is ModulesToSaveWrapper
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)
    assert id(wrapper.original_module) == id(original)
    assert isinstance(wrapper.modules_to_save, nn.ModuleDict)
    assert torch.equal(wrapper.modules_to_save["a"].get_parameter("weight"), original.weight)
    assert wrapper.modules_to_save["a"].weight is not original.weight


def names_match_whole_segments() -> None:
    base = nn.ModuleDict(
        {"head": nn.Linear(2, 2), "overhead": nn.Linear(2, 2), "deep": nn.ModuleDict({"head": nn.Linear(2, 2)}), "x": nn.Linear(2, 2)}
    )
    model = get_peft_model(base, get_peft_config({"peft_type": "LORA", "target_modules": ["x"], "modules_to_save": ["head"]}))
    wrapped = {name for name, module in model.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert wrapped == {"head", "deep.head"}


@over(*SORTS)
def active_copy_runs(kind: str) -> None:
    model = made(kind, name="a", **HEAD)
    model.add_adapter("b", config(kind))
    x = torch.randn(2, 32)
    wrapper = _head(model)
    assert torch.equal(wrapper(x), wrapper.modules_to_save["a"](x))
    with model.disable_adapter():
        assert torch.equal(wrapper(x), wrapper.original_module(x))
    model.set_adapter("b")
    assert torch.equal(wrapper(x), wrapper.original_module(x))


def attributes_are_those_of_the_active_copy() -> None:
    model = made("lora", name="a", **HEAD)
    model.add_adapter("b", config("lora", **HEAD))
    wrapper = _head(model)
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert wrapper.in_features == 32
    model.set_adapter("b")
    assert wrapper.weight is wrapper.modules_to_save["b"].weight
    with model.disable_adapter():
        assert wrapper.weight is wrapper.original_module.weight


@pytest.mark.filterwarnings("ignore")
def containers_are_refused() -> None:
    for bad in (nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleList([nn.Linear(2, 2)]), nn.ParameterDict(), nn.ParameterList()):
        base = nn.ModuleDict({"x": nn.Linear(2, 2), "bad": bad})
        with refused(TypeError, "bad"):
            get_peft_model(base, get_peft_config({"peft_type": "LORA", "target_modules": ["x"], "modules_to_save": ["bad"]}))


def adapted_modules_can_be_saved_by_others() -> None:
    model = made("lora", name="a")
    before = run(model)
    model.add_adapter("b", config("lora", target_modules=["v_proj"], modules_to_save=["q_proj"]))
    assert torch.equal(run(model), before)
    model.set_adapter("b")
    assert torch.equal(run(model), run(tiny()))
    randomise(model, "b", 1)
    assert not same(run(model), run(tiny()))
    model.set_adapter("a")
    assert torch.equal(run(model), before)


def active_copy_is_left_by_merging() -> None:
    model = made("lora", **HEAD)
    copy = _head(model).modules_to_save["default"]
    assert model.merge_and_unload().lm_head is copy


def flags_follow_set_adapter() -> None:
    model = fresh("lora", name="a", **HEAD)
    model.add_adapter("b", config("lora", **HEAD))
    wrapper = _head(model)
    for name, other in (("b", "a"), ("a", "b")):
        model.set_adapter(name)
        assert wrapper.modules_to_save[name].weight.requires_grad
        assert not wrapper.modules_to_save[other].weight.requires_grad
    wrapper.set_adapter("b")
    assert wrapper.active_adapter == "b"
    assert wrapper.modules_to_save["b"].weight.requires_grad


def one_wrapper_can_be_switched() -> None:
    wrapper = _head(made("lora", **HEAD))
    x = torch.randn(2, 32)
    wrapper.enable_adapters(False)
    assert wrapper.disable_adapters
    assert torch.equal(wrapper(x), wrapper.original_module(x))
    wrapper.enable_adapters(True)
    assert torch.equal(wrapper(x), wrapper.modules_to_save["default"](x))


def wrapper_names_its_tensors() -> None:
    wrapper = _head(made("lora", **HEAD))
    assert wrapper.adapter_state_dict_load_map("default") == {"weight": "modules_to_save.default.weight"}
    found = wrapper.adapter_state_dict("default", wrapper.state_dict())
    assert torch.equal(found["weight"], wrapper.modules_to_save["default"].weight)


def composite_modules_are_saved(tmp_path: Path) -> None:
    for kind in SORTS:
        model = made(kind, modules_to_save=["mlp"])
        model.save_pretrained(tmp_path / kind)
        assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / kind)), run(model))


# ---- trainable_token_indices -----------------------------------------------------------------------------------------
def _rows(model: Any, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: value for key, value in parameters_of(model, name).items() if "token" in key}


def listed_rows_train_alone() -> None:
    for given in ([1, 5], {"embed_tokens": [1, 5]}, {"model.embed_tokens": [1, 5]}):
        model = fresh("lora", trainable_token_indices=given)
        ((_, rows),) = _rows(model).items()
        assert rows.shape == (2, 32)
        assert torch.equal(rows, tiny().model.embed_tokens.weight[[1, 5]])
        assert rows.requires_grad
        assert torch.equal(run(model.eval()), run(tiny()))


def rows_replace_those_of_the_base() -> None:
    model = made("lora", trainable_token_indices=[1, 5])
    ((_, rows),) = _rows(model).items()
    words = model.get_base_model().get_input_embeddings()(torch.tensor([[0, 1, 5]]))
    assert torch.equal(words[0, 1:], rows)
    assert torch.equal(words[0, 0], tiny().model.embed_tokens.weight[0])
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny()))


def tied_outputs_use_the_same_rows() -> None:
    model = made("lora", "gpt2", trainable_token_indices=[1, 5])
    ((_, rows),) = _rows(model).items()
    x = torch.randn(3, 32)
    logits = model.get_base_model().lm_head(x)
    assert same(logits[:, [1, 5]], x @ rows.T)
    assert same(logits[:, 2], x @ tiny("gpt2").lm_head.weight[2])


def overlapping_rows_are_refused() -> None:
    model = fresh("lora", name="a", trainable_token_indices=[1, 5])
    model.add_adapter("b", config("lora", trainable_token_indices=[5, 6]))
    with refused(ValueError, "5"):
        model.base_model.set_adapter(["a", "b"])
    with refused(ValueError, "5"):
        model.merge_adapter(["a", "b"])
    assert list(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]


def saved_embeddings_have_no_rows() -> None:
    with refused(ValueError, "embed_tokens"):
        fresh("lora", trainable_token_indices=[1], modules_to_save=["embed_tokens"])


def merging_writes_the_rows() -> None:
    model = made("lora", trainable_token_indices=[1, 5])
    ((_, rows),) = _rows(model).items()
    expected = run(model)
    model.merge_adapter()
    assert torch.equal(model.get_base_model().get_input_embeddings().weight[[1, 5]], rows)
    assert same(run(model), expected, atol=1e-4)


def rows_are_saved(tmp_path: Path) -> None:
    model = made("lora", trainable_token_indices=[1, 5])
    model.save_pretrained(tmp_path)
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path)), run(model))


def wrapper_of_rows_is_auxiliary() -> None:
    model = made("lora", trainable_token_indices=[1, 5])
    wrapper: Any = model.get_base_model().get_input_embeddings()
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)
    mapping = wrapper.adapter_state_dict_load_map("default")
    found = wrapper.adapter_state_dict("default", wrapper.state_dict())
    assert found.keys() == mapping.keys()
    ((_, rows),) = _rows(model).items()
    assert any(torch.equal(value, rows) for value in found.values())


# ---- ensure_weight_tying ---------------------------------------------------------------------------------------------
def tied_copies_stay_tied() -> None:
    model = fresh("lora", "gpt2", modules_to_save=["wte"], ensure_weight_tying=True)
    base: Any = model.get_base_model()
    assert base.transformer.wte.modules_to_save["default"].weight is base.lm_head.modules_to_save["default"].weight


def tied_targets_share_their_factors() -> None:
    own: dict[str, Any] = {"target_modules": ["wte"], "ensure_weight_tying": True, "fan_in_fan_out": False}
    model = made("lora", "gpt2", **own)
    base: Any = model.get_base_model()
    words, head = base.transformer.wte, base.lm_head
    x = torch.randn(2, 32)
    change = words.scaling["default"] * words.lora_embedding_B["default"] @ words.lora_embedding_A["default"]
    assert same(head(x), x @ (head.get_base_layer().weight + change.T).T)


def broken_ties_are_warned_of() -> None:
    for more in ({"modules_to_save": ["wte"]}, {"target_modules": ["wte"], "fan_in_fan_out": False}):
        with pytest.warns(UserWarning, match="tie"):
            fresh("lora", "gpt2", **more)

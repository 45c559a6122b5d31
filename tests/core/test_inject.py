"""`inject_adapter_in_model`: adapters in a model that keeps its class."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
from peft_core import (
    CapabilityError,
    ConfigError,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from support import CueConfig, DenseLayer, dense

X = support.features()


def wrapped(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DenseLayer)]


def test_the_same_model_comes_back() -> None:
    base = support.net()
    assert inject_adapter_in_model(dense(), base) is base
    assert wrapped(base) == ["layers.0.up", "layers.1.up", "last"]


def test_the_model_gets_its_configs() -> None:
    config = dense()
    model = inject_adapter_in_model(config, support.net(), "mine")
    assert model.peft_config == {"mine": config}


def test_it_computes_what_a_wrapped_model_computes() -> None:
    injected = inject_adapter_in_model(dense(), support.net())
    peft_model = get_peft_model(support.net(), dense())
    set_peft_model_state_dict(peft_model, get_peft_model_state_dict(injected))
    assert torch.equal(injected(X), peft_model(X))


def test_the_adapter_trains_and_the_base_is_frozen() -> None:
    model = inject_adapter_in_model(dense(), support.net(), "mine")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if "mine" in n.split(".")}


def test_an_adapter_for_inference_is_frozen() -> None:
    model = inject_adapter_in_model(dense(inference_mode=True), support.net())
    assert not any(p.requires_grad for p in model.parameters())


def test_more_adapters_can_be_injected() -> None:
    model: Any = inject_adapter_in_model(dense(), support.net(), "a")
    inject_adapter_in_model(dense(target_modules=["down"]), model, "b")
    assert list(model.peft_config) == ["a", "b"]
    assert len(wrapped(model)) == 5


def test_keys_have_no_wrapper_prefix() -> None:
    model = inject_adapter_in_model(dense(modules_to_save=["head"]), support.net())
    assert set(get_peft_model_state_dict(model)) == {
        "layers.0.up.dense_delta",
        "layers.1.up.dense_delta",
        "last.dense_delta",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_keys_are_accepted_with_and_without_the_prefix(prefix: str) -> None:
    model: Any = inject_adapter_in_model(dense(), support.net())
    tensors = {prefix + key: torch.ones_like(value) for key, value in get_peft_model_state_dict(model).items()}
    assert set_peft_model_state_dict(model, tensors) == ([], [])
    assert (model.last.dense_delta["default"] == 1).all()


def test_virtual_tokens_can_not_be_injected() -> None:
    base = support.llama()
    with support.Unchanged(base), pytest.raises(CapabilityError, match="CUE can't be injected"):
        inject_adapter_in_model(CueConfig(num_virtual_tokens=2), base)


# ---- modules chosen by a state dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_keys_of_a_state_dict_choose_the_modules(prefix: str) -> None:
    keys = [f"{prefix}layers.1.up.dense_delta", f"{prefix}last.dense_delta"]
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered between the PEFT config and the provided state_dict"):
        model = inject_adapter_in_model(dense(), support.net(), state_dict=dict.fromkeys(keys))
    assert wrapped(model) == ["layers.1.up", "last"]


def test_a_state_dict_that_agrees_with_the_config_is_silent() -> None:
    keys = ["layers.0.up.dense_delta", "layers.1.up.dense_delta", "last.dense_delta"]
    assert len(wrapped(inject_adapter_in_model(dense(), support.net(), state_dict=dict.fromkeys(keys)))) == 3


def test_the_values_of_a_state_dict_are_not_used() -> None:
    keys = ["layers.0.up.dense_delta", "layers.1.up.dense_delta", "last.dense_delta"]
    model: Any = inject_adapter_in_model(dense(start="zero"), support.net(), state_dict={key: torch.ones(4, 4) for key in keys})
    assert (model.last.dense_delta["default"] == 0).all()


def test_a_state_dict_of_another_model_changes_nothing() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match="does not have: 'lasst'; did you mean 'last'"):
        inject_adapter_in_model(dense(), base, state_dict={"lasst.dense_delta": None})


def test_a_state_dict_of_another_method_changes_nothing() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match="no key of state_dict contains 'dense_'"):
        inject_adapter_in_model(dense(), base, state_dict={"last.lora_A.weight": None})


# ---- status -----------------------------------------------------------------------------------------------------------


def test_names_in_the_status_are_those_of_the_model() -> None:
    model = inject_adapter_in_model(dense(), support.net())
    assert [layer.name for layer in get_layer_status(model)] == ["layers.0.up", "layers.1.up", "last"]


def test_the_status_of_a_bare_model_knows_no_wrapper() -> None:
    status = get_model_status(inject_adapter_in_model(dense(), support.net()))
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("Net", "None", {})
    assert status.active_adapters == ["default"]

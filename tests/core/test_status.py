"""The status of layers and of the whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

import support
from peft_core import PeftModel, TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status, get_peft_model
from support import CueConfig, dense


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(support.net(), dense(modules_to_save=["head"]), "a")
    model.add_adapter("b", dense(target_modules=["last"]))
    return model


def test_the_status_of_a_layer(model: PeftModel) -> None:
    [status] = [layer for layer in model.get_layer_status() if layer.name == "model.last"]
    assert status == TunerLayerStatus(
        name="model.last",
        module_type="dense.DenseLayer",
        enabled=True,
        active_adapters=["a"],
        merged_adapters=[],
        requires_grad={"a": True, "b": False},
        available_adapters=["a", "b"],
        devices={"a": ["cpu"], "b": ["cpu"]},
    )


def test_saved_modules_have_a_status_too(model: PeftModel) -> None:
    [status] = [layer for layer in model.get_layer_status() if layer.name == "model.head"]
    assert (status.module_type, status.available_adapters) == ("ModulesToSaveWrapper", ["a"])


def test_the_status_of_the_model(model: PeftModel) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    assert model.get_model_status() == TunerModelStatus(
        base_model_type="Net",
        adapter_model_type="DenseModel",
        peft_types={"a": "DENSE", "b": "DENSE"},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=4,
        enabled=True,
        active_adapters=["a"],
        merged_adapters=[],
        requires_grad={"a": True, "b": False},
        available_adapters=["a", "b"],
        devices={"a": ["cpu"], "b": ["cpu"]},
    )


def test_the_functions_say_what_the_methods_say(model: PeftModel) -> None:
    assert get_layer_status(model) == model.get_layer_status()
    assert get_model_status(model) == model.get_model_status()


def test_status_objects_are_dataclasses(model: PeftModel) -> None:
    assert dataclasses.asdict(model.get_model_status())["base_model_type"] == "Net"


def test_active_adapters_follow(model: PeftModel) -> None:
    model.set_adapter(["a", "b"])
    assert model.get_model_status().active_adapters == ["a", "b"]


def test_disabled_is_seen(model: PeftModel) -> None:
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    assert not any(layer.enabled for layer in model.get_layer_status())


def test_merged_is_seen(model: PeftModel) -> None:
    model.merge_adapter(["a"])
    assert model.get_model_status().merged_adapters == ["a"]


def test_partly_merged_is_irregular(model: Any) -> None:
    model.get_base_model().last.merge(adapter_names=["a"])
    assert model.get_model_status().merged_adapters == "irregular"


def test_partly_frozen_is_irregular(model: Any) -> None:
    model.get_base_model().last.dense_delta["a"].requires_grad_(False)
    assert model.get_model_status().requires_grad == {"a": "irregular", "b": False}


def test_looking_changes_nothing(model: PeftModel) -> None:
    with support.Unchanged(model):
        model.get_model_status()
        model.get_layer_status()


def test_virtual_tokens_have_a_status() -> None:
    status = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=2), "a").get_model_status()
    assert (status.peft_types, status.requires_grad, status.active_adapters) == ({"a": "CUE"}, {"a": True}, ["a"])


def test_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="No adapter layers found in the model"):
        get_model_status(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="No adapter layers found in the model"):
        get_layer_status(nn.Linear(2, 2))

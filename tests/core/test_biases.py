"""Trained biases: parameters of the base itself that an adapter trains and saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import support
from peft_core import PeftModel, PeftWarning, get_peft_model, get_peft_model_state_dict
from support import DenseConfig

X = support.features()


def trained(model: PeftModel) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad and "bias" in name}


def test_none_trains_none() -> None:
    assert trained(get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="none"))) == set()


def test_all_trains_every_bias_of_the_base() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all"))
    assert trained(model) == {"last.base_layer.bias", "head.bias"} | {f"layers.{i}.{leaf}.bias" for i in (0, 1) for leaf in ("up", "down", "norm")}


def test_targets_trains_the_biases_of_adapted_modules() -> None:
    assert trained(get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="targets"))) == {"last.base_layer.bias"}


def test_keys_in_a_file() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last", "up"], bias="targets"))
    assert {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(model) if "bias" in key} == {
        "last.base_layer.bias",
        "layers.0.up.base_layer.bias",
        "layers.1.up.base_layer.bias",
    }


def test_biases_follow_set_adapter() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all"), "a")
    model.add_adapter("b", DenseConfig(target_modules=["last"]))
    model.set_adapter("b")
    assert trained(model) == set()
    model.set_adapter("a")
    assert "head.bias" in trained(model)


def test_trained_biases_come_back(tmp_path: Path) -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all", start="random"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(support.net(), tmp_path)(X), model.eval()(X))


def test_two_adapters_can_not_both_train_them() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all"), "a")
    with support.Unchanged(model), pytest.raises(ValueError, match=r"'a' trains biases of the base in place.*'b'"):
        model.add_adapter("b", DenseConfig(target_modules=["last"], bias="targets"))


def test_after_deleting_the_one_another_may() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all"), "a")
    model.add_adapter("b", DenseConfig(target_modules=["last"]))
    model.set_adapter("b")
    model.delete_adapter("a")
    assert trained(model) == set()
    model.add_adapter("c", DenseConfig(target_modules=["last"], bias="all"))


def test_disabling_says_that_biases_stay() -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all"))
    with pytest.warns(PeftWarning, match="does not produce the same output as the base"), model.disable_adapter():
        pass

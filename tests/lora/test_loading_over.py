"""Loading over an adapter that started in another way: a start says nothing of tensors that come from a file, unless it changed the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core import ConfigError, PeftWarning, get_peft_model
from peft_lora import EvaConfig, LoftQConfig, LoraConfig
from support import Unchanged, features, net, randomise


def made(init: Any, seed: int = 7, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model: Any = get_peft_model(net(), LoraConfig(r=2, target_modules=["up", "last"], init_lora_weights=init, **fields)).eval()
    randomise(model, "default", seed)
    return model


@pytest.mark.parametrize("present", [True, False, "gaussian", "orthogonal", "eva"])
@pytest.mark.parametrize("loaded", [True, "gaussian", "eva"])
def test_starts_that_leave_the_base_alone(present: Any, loaded: Any, tmp_path: Path) -> None:
    fields = {True: {"eva_config": EvaConfig()}}
    other = made(loaded, 8, **fields.get(loaded == "eva", {}))
    other.save_pretrained(tmp_path)
    model = made(present, **fields.get(present == "eva", {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(features()), other(features()))


@pytest.mark.parametrize("edited", [True, False])
def test_the_own_file_of_an_adapter_that_changed_the_base(edited: bool, tmp_path: Path) -> None:
    model = made("pissa")
    expected = model(features())
    model.peft_config["default"].init_lora_weights = edited
    model.save_pretrained(tmp_path)
    model.peft_config["default"].init_lora_weights = "pissa"
    randomise(model, "default", 9)
    with pytest.warns(PeftWarning, match="are assumed to be trained on the changed weights"):
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(features()), expected)


def test_a_file_with_the_start_that_an_edited_config_does_not_say_any_more(tmp_path: Path) -> None:
    model = made("pissa")
    expected = model(features())
    model.save_pretrained(tmp_path)
    model.peft_config["default"].init_lora_weights = True
    randomise(model, "default", 9)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(features()), expected)


@pytest.mark.parametrize(
    ("present", "loaded"),
    [(True, "pissa"), ("olora", "pissa"), ("pissa", "olora"), ("pissa", "pissa_niter_4"), (True, "loftq"), (True, "mica"), ("mica", True)],
)
def test_starts_that_need_another_base_are_refused(present: Any, loaded: Any, tmp_path: Path) -> None:
    fields = {"loftq_config": LoftQConfig()} if loaded == "loftq" else {}
    made(loaded, 8, **fields).save_pretrained(tmp_path)
    model = made(present)
    with Unchanged(model), pytest.raises(ConfigError, match="in another way than the file's") as caught:
        model.load_adapter(tmp_path, "default")
    assert caught.value.code == "other-config"


def test_an_adapter_whose_config_was_edited_to_pissa_has_not_changed_its_base(tmp_path: Path) -> None:
    made("olora", 8).save_pretrained(tmp_path)
    model = made(True)
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ConfigError, match="in another way than the file"):
        model.load_adapter(tmp_path, "default")

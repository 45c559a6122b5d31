"""Functions, dictionaries and signatures that are in `peft` alone, on core's own small tuners; beside them the rows of the page, `test_page.py`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_core
import support
from peft.helpers import check_if_peft_model, update_signature
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import (
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    bloom_model_postprocess_past_key_value,
    infer_device,
    register_peft_method,
    shift_tokens_right,
    transpose,
)
from peft_core import ConfigError, DuplicateTunerError, PeftType, get_peft_model, unregister_tuner
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_core.testing.models import inputs_of
from support import DENSE, DenseConfig, DenseTuner


@pytest.fixture(autouse=True)
def small_tuners() -> Iterator[None]:
    """The tuners DENSE (wraps layers) and CUE (virtual tokens) are known during each test."""
    with support.registered(support.DENSE, support.CUE):
        yield


def dense() -> DenseConfig:
    return DenseConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


# ---- tensors and devices --------------------------------------------------------------------------------------------
def test_shifting_labels() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert shift_tokens_right(labels, 0, 2).tolist() == [[2, 5, 6], [2, 7, 0]]
    with pytest.raises(ConfigError, match="pad_token_id"):
        shift_tokens_right(labels, None, 2)


def test_the_layout_of_old_bloom() -> None:
    layers, batch, heads, count, width = 2, 2, 3, 4, 5
    given = torch.arange(2 * layers * batch * heads * count * width).view(2 * layers, batch, heads, count, width)
    found = bloom_model_postprocess_past_key_value(given)
    assert len(found) == layers
    keys, values = found[1]
    assert torch.equal(keys[heads + 1], given[1, 1, 1].T)
    assert torch.equal(values[heads + 1], given[layers + 1, 1, 1])


def test_small_helpers() -> None:
    weight = torch.arange(6).view(2, 3)
    assert torch.equal(transpose(weight, True), weight.T)
    assert transpose(weight, False) is weight
    assert infer_device() in ("cpu", "cuda", "mps", "npu", "xpu", "mlu")


# ---- mappings -------------------------------------------------------------------------------------------------------
def test_mappings_know_every_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DENSE] is DenseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["DENSE"] is DenseTuner
    assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING["CUE"] is peft_core.PeftMixedModel
    assert "CUE" in PEFT_TYPE_TO_CONFIG_MAPPING
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        assert {"CUE", "DENSE"} <= set(mapping) == set(mapping.keys()) == {name for name, _ in mapping.items()}
        assert len(mapping) == len(list(mapping.values())) == len(list(mapping))
    assert "NO" not in PEFT_TYPE_TO_CONFIG_MAPPING
    with pytest.raises(KeyError):
        PEFT_TYPE_TO_CONFIG_MAPPING["NO"]
    assert TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING == {}


def test_registering_in_other_words() -> None:
    class NewConfig(DenseConfig):
        default_peft_type = "NEW"

    with pytest.raises(ConfigError, match="lower case"):
        register_peft_method(name="New", config_cls=NewConfig, model_cls=DenseTuner)
    with pytest.raises(DuplicateTunerError, match="already PEFT method called 'dense'"):
        register_peft_method(name="dense", config_cls=NewConfig, model_cls=DenseTuner)
    with pytest.raises(ConfigError, match="model_cls"):
        register_peft_method(name="new", config_cls=NewConfig, model_cls=dict)
    register_peft_method(name="new", config_cls=NewConfig, model_cls=DenseTuner, prefix=DENSE.parameter_prefix)
    try:
        assert PEFT_TYPE_TO_CONFIG_MAPPING["NEW"] is NewConfig
    finally:
        unregister_tuner("NEW")


# ---- signatures -----------------------------------------------------------------------------------------------------
def test_signatures_of_the_base() -> None:
    model: Any = get_peft_model(tiny(), dense()).eval()
    inputs = inputs_of("llama", 2)
    expected = model(**inputs).logits
    update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert model.forward.__doc__ == type(model.get_base_model()).forward.__doc__
    assert torch.equal(model(**inputs).logits, expected)
    assert model.generate(**inputs, max_new_tokens=2).shape == (2, 8)
    assert "input_ids" not in inspect.signature(type(model).forward).parameters
    with pytest.raises(ConfigError, match="not supported"):
        update_signature(model, "backward")  # type: ignore[arg-type]


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter, and its base, in folders."""
    tiny().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base: Any = type(tiny()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    model = get_peft_model(base, dense())
    randomise(model, "default", 0)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_is_it_an_adapter(saved: Path) -> None:
    assert check_if_peft_model(saved)
    assert not check_if_peft_model(saved.parent / "base")
    assert not check_if_peft_model(saved.parent / "nothing")

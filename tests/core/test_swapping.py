"""Doors for tuners: operations on models, weights replaced in place, low-rank factors, files of adapters that are in no model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterWeightsError,
    Capability,
    ConfigError,
    PeftModel,
    file_key,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    load_peft_weights,
    require_index,
    write_adapter,
)
from peft_core.tensor_names import without_adapter

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def describe(model: nn.Module, adapter: str, *, loud: bool = False) -> str:
    text = f"{adapter} of {len(require_index(model).configs)}"
    return text.upper() if loud else text


class SwapTuner(support.DenseTuner):
    operations: ClassVar[Mapping[str, Callable[..., Any]]] = {"describe": describe}
    swappable: ClassVar[frozenset[str]] = frozenset({"start"})


SWAP = replace(support.DENSE, peft_type="SWAP", tuner=SwapTuner, capabilities=support.DENSE.capabilities | Capability.HOTSWAP)


class SwapConfig(support.DenseConfig):
    default_peft_type: ClassVar[str | None] = "SWAP"


SWAP = replace(SWAP, config=SwapConfig)


@pytest.fixture(autouse=True)
def tuners() -> Any:
    with support.registered(SWAP):
        yield


def made(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(support.Net(), SwapConfig(**{"target_modules": ["up", "last"], "start": "random", **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in require_index(model).parameters_of("default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# ---- operations -----------------------------------------------------------------------------------------------------------


def test_operations_of_a_tuner_are_methods_of_the_model_and_of_its_base_model() -> None:
    model = made()
    assert model.describe("default") == "default of 1"
    assert model.base_model.describe("default", loud=True) == "DEFAULT OF 1"


def test_models_without_an_adapter_of_the_tuner_do_not_have_them() -> None:
    model: Any = get_peft_model(support.Net(), support.DenseConfig(target_modules=["up"]))
    with pytest.raises(AttributeError, match="describe"):
        model.describe("default")
    model.add_adapter("swap", SwapConfig(target_modules=["last"]))
    assert model.describe("swap") == "swap of 2"
    model.delete_adapter("swap")
    assert not hasattr(model, "describe")


def test_operations_survive_copies_and_pickles_and_what_the_base_has_is_still_found() -> None:
    model = made()
    model.get_base_model().extra = 5
    assert copy.deepcopy(model).describe("default") == "default of 1"
    assert copy.deepcopy(model.base_model).extra == 5
    plain: Any = get_peft_model(support.Net(), support.DenseConfig(target_modules=["up"]))
    with pytest.raises(AttributeError):
        _ = pickle.loads(pickle.dumps(plain.base_model)).describe


# ---- the swap -------------------------------------------------------------------------------------------------------------


def test_weights_of_any_tuner_that_declares_it_are_replaced_in_place(tmp_path: Path) -> None:
    model, other = made(1), made(2, start="zero")
    places = [parameter.data_ptr() for parameter in require_index(model).parameters_of("default")]
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), other(X))
    assert [parameter.data_ptr() for parameter in require_index(model).parameters_of("default")] == places
    assert model.peft_config["default"].start == "zero"


@pytest.mark.parametrize(
    ("options", "spoil", "error", "words"),
    [
        ({"alpha": 3}, "", ConfigError, "alpha=3 instead of 1"),
        ({}, "missing", AdapterWeightsError, "no new tensor for 'dense_delta' of 'last'"),
        ({}, "shape", AdapterWeightsError, r"size mismatch: 'dense_delta' of 'last' is \(2, 2\), expected \(4, 4\)"),
        ({}, "surplus", AdapterWeightsError, "unexpected keys:"),
    ],
)
def test_what_does_not_fit_changes_nothing(options: Any, spoil: str, error: type[Exception], words: str) -> None:
    model, other = made(1), made(2, **options)
    state = get_peft_model_state_dict(other)
    last = "base_model.model.last.dense_delta"
    if spoil == "missing":
        del state[last]
    elif spoil == "shape":
        state[last] = torch.zeros(2, 2)
    elif spoil == "surplus":
        state["base_model.model.first.dense_delta"] = torch.zeros(4, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_download_options_are_checked() -> None:
    with pytest.raises(TypeError, match="revison"):
        hotswap_adapter(made(), "somewhere", "default", revison="main")


def test_names_in_memory_become_names_in_files() -> None:
    assert without_adapter("base_model.model.a.dense_delta.default", "default", "dense_") == "base_model.model.a.dense_delta"
    assert without_adapter("_orig_mod.a.lora_A.x.weight", "x", "lora_") == "a.lora_A.weight"
    # a module of the base may be called as the adapter is
    assert without_adapter("default.dense_delta", "default", "dense_") == "default.dense_delta"


# ---- what else tuners may need --------------------------------------------------------------------------------------------


def test_models_without_adapters_have_no_index() -> None:
    compiled = nn.Module()
    compiled._orig_mod = made()  # as torch.compile wraps it
    assert require_index(compiled).configs
    with pytest.raises(AdapterNotFoundError, match="No adapter layers found in the model Net"):
        require_index(support.Net())


def test_an_adapter_of_no_model_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    model = made(1)
    tensors: dict[str, Tensor] = {file_key("base_model.model.", path, "dense_delta"): torch.ones(4, 4) for path in ("layers.0.up", "last")}
    for safe in (False, True):
        write_adapter(tmp_path, SwapConfig(target_modules=["layers.0.up", "last"]), tensors, model, safe_serialization=safe)
        assert load_peft_weights(tmp_path).keys() == tensors.keys()
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors" if safe else ".bin"}
    torch.manual_seed(0)
    assert PeftModel.from_pretrained(support.Net(), tmp_path).peft_config["default"].inference_mode
    with pytest.raises(AdapterFileError, match="not a file"):
        write_adapter(tmp_path / "adapter_config.json", SwapConfig(), tensors, model)


def test_layers_have_no_low_rank_factors_unless_they_say_so() -> None:
    layer = made().base_model.model.last
    assert layer.low_rank_factors("default") is None
    assert layer.merging.shift_of("default") is None
    layer.shift_base("default", torch.ones(4, 4))
    assert torch.equal(layer.merging.shift_of("default"), torch.ones(4, 4))

"""`save_pretrained(path_initial_model_for_weight_conversion=…)`: an adapter that changed the base, saved for the base as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_lora
from peft_core import AdapterFileError, AdapterWeightsError, CapabilityError, ConfigError, PeftModel, PeftWarning, get_peft_model
from peft_core.testing import tiny
from peft_lora import CordaConfig, LoftQConfig, LoraConfig, LoraGAConfig
from support import DENSE, DenseConfig, Unchanged, files_in, registered


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8)
        self.b = Conv1D(10, 8)
        self.head = nn.Linear(10, 2)
        nn.init.normal_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def created(init: str, **options: Any) -> PeftModel:
    settings = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}, "loftq": {"loftq_config": LoftQConfig()}}
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["a", "b"], **settings.get(init, {}), **options}
    config, base = LoraConfig(init_lora_weights=init, **options), Net()
    if init == "corda":
        peft_lora.preprocess_corda(base, config, lambda: base(X))
    if init == "lora_ga":
        peft_lora.preprocess_loraga(base, config, lambda: base(X).square().sum().backward())
    torch.manual_seed(2)
    return get_peft_model(base, config)


def trained(model: PeftModel, folder: Path) -> Tensor:
    """Save a new adapter, move it, and return what it computes then."""
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model.eval()(X)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"a": 2}, "alpha_pattern": {"b": 7}},
        {"use_rslora": True, "rank_pattern": {"a": 2}, "alpha_pattern": {"b": 7}},  # the peer refuses this one
        {"use_dora": True},
        {"modules_to_save": ["head"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora-patterns", "dora", "saved"],
)
def test_the_converted_adapter_on_the_original_base_is_the_trained_model(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = created(init, **options)
    expected = trained(model, tmp_path / "initial")
    initial = files_in(tmp_path / "initial")
    with Unchanged(model):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert files_in(tmp_path / "initial") == initial  # the peer rewrites the config in there
    converted = PeftModel.from_pretrained(Net(), tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(converted(X), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(converted.base_model.model.a.get_base_layer().weight, Net().a.weight)
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert written["r"] == 6
    assert (written["corda_config"], written["lora_ga_config"]) == (None, None)
    assert model.peft_config["default"].init_lora_weights == init
    assert model.peft_config["default"].r == 3
    assert converted.base_model.model.a.scaling["default"] == pytest.approx(model.base_model.model.a.scaling["default"])


def test_an_untrained_adapter_becomes_nothing(tmp_path: Path) -> None:
    model = created("pissa")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path))
    converted = PeftModel.from_pretrained(Net(), tmp_path / "plain")
    assert converted.base_model.model.a.get_delta_weight("default").abs().max() < 1e-6


def test_matrices_with_a_rank_below_r(tmp_path: Path) -> None:
    model = created("pissa", r=7, target_modules=["a", "b"])  # a has 6 singular values
    expected = trained(model, tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=3e-5, rtol=1e-5)


def test_one_of_several_adapters(tmp_path: Path) -> None:
    model = created("pissa")
    expected = trained(model, tmp_path / "initial")
    with pytest.warns(PeftWarning, match="the start of 'default' changes the base weight"):
        model.add_adapter("other", LoraConfig(target_modules=["a"]))
    model.save_pretrained(tmp_path / "plain", selected_adapters=["default"], path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_what_left_the_base_alone_is_saved_as_it_is(init: Any, tmp_path: Path) -> None:
    model = created(init, r=4)
    expected = trained(model, tmp_path / "initial")
    with pytest.warns(PeftWarning, match="did not change the base weights"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    found = PeftModel.from_pretrained(Net(), tmp_path / "plain")
    assert found.peft_config["default"].r == 4
    with torch.no_grad():
        torch.testing.assert_close(found(X), expected, atol=1e-6, rtol=1e-6)


def test_rounded_bases_can_not_be_told_from_the_first_factors(tmp_path: Path) -> None:
    model = created("loftq")
    trained(model, tmp_path / "initial")
    with pytest.raises(ConfigError, match="'loftq' belongs to the rounded base"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert not files_in(tmp_path / "plain")


def test_other_methods_have_nothing_to_convert(tmp_path: Path) -> None:
    with registered(DENSE):
        model = get_peft_model(Net(), DenseConfig(target_modules=["a"]))
        model.save_pretrained(tmp_path)
        with pytest.raises(CapabilityError, match=r"'default' \(DENSE\) did not change the base weights.*nothing to convert"):
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)


def test_initial_adapters_that_do_not_fit(tmp_path: Path) -> None:
    model = created("pissa")
    trained(model, tmp_path / "initial")
    created("pissa", target_modules=["a"]).save_pretrained(tmp_path / "fewer")
    created("pissa", lora_alpha=6).save_pretrained(tmp_path / "alpha")
    get_peft_model(tiny(), LoraConfig(r=3, lora_alpha=5)).save_pretrained(tmp_path / "other")
    for folder, error, message in (
        ("fewer", AdapterWeightsError, r"'base_model.model.b.lora_A.weight' of 'default' is \(3, 8\), and the initial adapter lacks it"),
        ("alpha", ConfigError, "lora_alpha=6 instead of 5"),
        ("other", AdapterWeightsError, "the initial adapter lacks it"),
        ("absent", ConfigError, "adapter_config.json"),
    ):
        with Unchanged(model), pytest.raises(error, match=message):
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / folder)
        assert not files_in(tmp_path / "plain") if (tmp_path / "plain").exists() else True
    (tmp_path / "alpha" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="Can't find weights"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "alpha")


# ---- the config as edited says nothing of what was done to the base --------------------------------------------------------


@pytest.mark.parametrize("edited", [True, False, "gaussian"])
def test_an_edited_config_changes_nothing(edited: Any, tmp_path: Path) -> None:
    model = created("pissa")
    model.peft_config["default"].init_lora_weights = edited
    expected = trained(model, tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=2e-5, rtol=1e-5)


def test_a_config_that_was_edited_to_another_start_that_changes_the_base(tmp_path: Path) -> None:
    model = created(True)
    model.peft_config["default"].init_lora_weights = "pissa"
    trained(model, tmp_path / "initial")
    with pytest.warns(PeftWarning, match="did not change the base weights"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")


@pytest.mark.filterwarnings("ignore:`loftq_config` is ignored")
def test_a_rounded_base_with_an_edited_config(tmp_path: Path) -> None:
    model = created("loftq")
    model.peft_config["default"].init_lora_weights = True
    trained(model, tmp_path / "initial")
    with pytest.raises(ConfigError, match=r"is not s·B·A"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert not files_in(tmp_path / "plain")


def test_what_left_the_base_is_what_the_layers_say(tmp_path: Path) -> None:
    """An initial folder that was written too late gives the right adapter all the same."""
    model = created("pissa")
    trained(model, tmp_path / "early")
    expected = trained(model, tmp_path / "late")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "late")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"a": 2}}, {"use_rslora": True}], ids=["plain", "patterns", "rslora"])
def test_an_adapter_on_a_residual_that_somebody_saved(init: bool, options: dict[str, Any], tmp_path: Path) -> None:
    model = created("pissa", **options)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(tmp_path / "initial")
    residual = model.unload(restore_base=False)
    model = PeftModel.from_pretrained(residual, tmp_path / "initial", is_trainable=True)
    expected = trained(model, tmp_path / "again")
    with pytest.warns(PeftWarning, match="assumed to be the residual"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=2e-5, rtol=1e-5)


def test_a_kasa_is_saved_as_it_is(tmp_path: Path) -> None:
    """It truncates the base by itself, also when it is loaded."""
    config = LoraConfig(r=3, target_modules=["a", "b"], kasa_config=peft_lora.KasaConfig())
    model = get_peft_model(Net(), config)
    expected = trained(model, tmp_path / "initial")
    with pytest.warns(PeftWarning, match="did not change the base weights"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "plain")(X), expected, atol=2e-5, rtol=1e-5)


def test_convolutions_and_embeddings_beside_a_residual(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.conv, self.head = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2))

    ids = torch.tensor([[1, 2, 3], [4, 5, 8]])
    config = LoraConfig(r=2, target_modules=["words", "conv", "head"], init_lora_weights=False)
    model = get_peft_model(Words(), config)
    trained_on = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "initial")
    original = Words()
    with torch.no_grad():  # the base without what the adapter starts with
        for name in ("words", "conv", "head"):
            layer = getattr(model.base_model.model, name)
            getattr(original, name).weight.add_(layer.get_delta_weight("default"))
            for parameter in getattr(trained_on.base_model.model, name).parameters_of("default").values():
                parameter.add_(0.1)
        expected = trained_on.eval()(ids)
    with pytest.warns(PeftWarning, match="assumed to be the residual"):
        trained_on.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(original, tmp_path / "plain")(ids), expected, atol=2e-5, rtol=1e-5)

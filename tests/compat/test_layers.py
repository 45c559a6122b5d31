"""Layers as code written for upstream makes them, derives from them, or replaces their methods."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
import peft_core
import peft_lora
from compat.test_dropin_refusals import Lstm, Scale, custom_layer
from compat.tiny import randomise, worst
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d, Embedding, Linear, ParamWrapper, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:the active adapter")


def test_a_linear_is_made_by_itself() -> None:
    """As axolotl merges an adapter: fill A and B, then read the delta, or merge."""
    base = nn.Linear(6, 4)
    layer = Linear(base, adapter_name="default", config=peft.LoraConfig(r=2, lora_alpha=4), r=2, lora_alpha=4)
    assert layer.scaling == {"default": 2.0}
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    layer.lora_A["default"].weight.data = a
    layer.lora_B["default"].weight.data = b
    assert torch.allclose(layer.get_delta_weight("default"), 2 * b @ a)
    x = torch.randn(3, 6)
    expected = base(x) + 2 * x @ a.T @ b.T
    assert worst(layer(x), expected) < 1e-5
    layer.merge(adapter_names=["default"])
    assert worst(base(x), expected) < 1e-5


def test_a_parameter_is_wrapped_by_itself() -> None:
    base = nn.Module()
    base.weight = nn.Parameter(torch.randn(3, 4, 6))
    layer = ParamWrapper(base, adapter_name="default", parameter_name="weight", config=peft.LoraConfig(r=2), r=2, lora_alpha=4)
    assert layer.get_param() is base.weight
    assert layer.get_delta_weight("default").shape == (3, 4, 6)
    assert isinstance(layer, LoraLayer)


def test_other_layers_are_made_by_themselves() -> None:
    config = peft.LoraConfig(r=2)
    assert Embedding(nn.Embedding(9, 5), "default", config, r=2)(torch.arange(3)).shape == (3, 5)
    assert Conv2d(nn.Conv2d(3, 4, 3), "default", config, r=2)(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)
    assert isinstance(dispatch_default(nn.Linear(2, 2), "default", config), Linear)
    assert dispatch_default(nn.ReLU(), "default", config) is None
    with pytest.raises(ValueError, match="positive"):
        Linear(nn.Linear(2, 2), "default", config, r=0)


def test_what_injection_makes_is_an_instance() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    assert type(model[0]) is peft_lora.Linear
    for kind in (Linear, LoraLayer, BaseTunerLayer):
        assert isinstance(model[0], kind)
        assert issubclass(type(model[0]), kind)
        assert not isinstance(model, kind)
    assert not isinstance(model[0], Embedding)


def test_a_method_that_is_replaced_on_a_layer_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Linear.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", forward)
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    model(torch.zeros(1, 2))
    assert seen == [1]
    monkeypatch.undo()
    assert Linear.forward is original
    model(torch.zeros(1, 2))
    assert seen == [1]


def custom(**fields: Any) -> Any:
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["scale", "first"], **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config._register_custom_module({Scale: custom_layer()})
    return config


def test_one_warning_says_what_a_layer_of_ones_own_is() -> None:
    with pytest.warns(peft.PeftWarning, match="never merged"):
        peft.LoraConfig()._register_custom_module({Scale: custom_layer()})


def test_layers_of_ones_own_train_switch_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Lstm(), torch.randn(3, 8)
    plain = base(x)
    model = randomise(peft.get_peft_model(base, custom()))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("base_model.model.")[2] for name in names if "scale" in name} == {
        "scale.lora_A.default.weight",
        "scale.lora_B.default.weight",
    }
    expected = model(x)
    assert worst(expected, plain) > 1e-3
    with model.disable_adapter():
        assert worst(model(x), plain) == 0
    model.save_pretrained(tmp_path)
    model.add_adapter("other", custom(r=3))
    assert base.scale.r == {"default": 2, "other": 3}
    randomise(model, "other")
    model.set_adapter("other")
    assert worst(model(x), expected) > 1e-3
    model.delete_adapter("other")
    assert worst(model(x), expected) == 0
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Lstm(), tmp_path, config=custom())
    assert worst(loaded(x), expected) < 1e-6
    assert type(model.unload().scale) is Scale
    assert worst(base(x), plain) == 0


def test_layers_of_ones_own_are_not_merged() -> None:
    model = randomise(peft.get_peft_model(Lstm(), custom()))
    x = torch.randn(3, 8)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(peft_core.MergeError, match="'scale' is a ScaleLora"):
            merge()
    assert worst(model(x), expected) == 0


def test_a_class_that_is_no_layer_is_refused() -> None:
    config, base = custom(), Lstm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config._register_custom_module({Scale: lambda *args, **kwargs: nn.ReLU()})  # type: ignore[dict-item]
    with pytest.raises((peft_core.ConfigError, AttributeError)):
        peft.get_peft_model(base, config)
    assert type(base.scale) is Scale
    assert type(base.first) is nn.Linear


def test_sign_and_pruning_of_merge_utils() -> None:
    from peft.utils import merge_utils

    tensors, weights = [torch.tensor([1.0, -4.0, 2.0]), torch.tensor([3.0, 1.0, -1.0])], torch.tensor([1.0, 2.0])
    assert merge_utils.task_arithmetic(tensors, weights).tolist() == [7.0, -2.0, 0.0]
    assert merge_utils.prune(tensors[0], 0.34, "magnitude").tolist() == [0.0, -4.0, 0.0]
    assert merge_utils.ties(tensors, weights, 1.0).tolist() == [3.5, -4.0, 2.0]
    with pytest.raises(ValueError, match="Density"):
        merge_utils.prune(tensors[0], -1.0, "magnitude")


def test_stand_ins_say_what_to_do() -> None:
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.gptq import GPTQLoraLinear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.lycoris_utils import LycorisTuner

    for call in (
        lambda: GPTQLoraLinear(nn.Linear(1, 1), "default"),
        lambda: DoraLinearLayer().update_layer(base_layer=None, lora_A=None, lora_B=None, scaling=1.0),
        lambda: DoraLinearVariant().init(None, "default"),
        lambda: LycorisTuner(nn.Linear(1, 1), None),
    ):
        with pytest.raises(peft_core.CapabilityError, match="is not made by itself here"):
            call()


def test_classes_of_lycoris_can_be_derived_from() -> None:
    from dataclasses import dataclass

    from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer

    @dataclass
    class Config(LycorisConfig):
        r: int = 4

    class Layer(nn.Module, LycorisLayer):  # type: ignore[misc]
        adapter_layer_names = ("mine_w",)

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            LycorisLayer.__init__(self, base_layer)
            self.mine_w = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2))})

    assert Config(target_modules=["q"]).rank_pattern == {}
    layer = Layer(nn.Linear(3, 2))
    assert (layer.in_features, layer.adapters(), list(layer.parameters_of("default"))) == (3, ("default",), ["mine_w"])
    assert isinstance(layer, BaseTunerLayer)
    with pytest.raises(peft_core.CapabilityError, match="does not say how it is merged"):
        layer.merge()

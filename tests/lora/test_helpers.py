"""Other scales, inputs that are not cast, norms of DoRA that are computed each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import support
from peft_core import AdapterNotFoundError, ConfigError, cached, get_peft_model
from peft_core import disable_input_dtype_casting as core_disable_input_dtype_casting
from peft_core.testing.models import OneLayer
from peft_lora import DoraCaching, LoraConfig, disable_input_dtype_casting, rescale_adapter_scale
from peft_lora.variants.dora import Dora

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def adapted(config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(support.Net(), config).eval()
    with torch.no_grad():
        for parameter in model._peft_index.parameters_of("default"):
            parameter.add_(torch.randn(parameter.shape))
    return model


def lora(**options: Any) -> Any:
    return adapted(LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["last"], **options}))


# ---- scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [0, 0.5, 2, -1])
def test_effects_are_multiplied_inside_the_block(multiplier: float) -> None:
    model = lora(target_modules=["head"])
    whole = model(X)
    with model.disable_adapter():
        plain = model(X)
    with rescale_adapter_scale(model, multiplier):
        torch.testing.assert_close(model(X), plain + multiplier * (whole - plain))
    assert torch.equal(model(X), whole)


def test_scales_return_after_an_error_bit_for_bit() -> None:
    model = lora()
    layer = model.base_model.model.last
    layer.set_scale("default", 1 / 3)
    before = layer.scaling["default"]

    def fail() -> None:
        with rescale_adapter_scale(model, 1 / 7):
            assert layer.scaling["default"] == before * (1 / 7)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert layer.scaling["default"] == before


def test_blocks_may_be_nested() -> None:
    model = lora()
    layer = model.base_model.model.last
    with rescale_adapter_scale(model, 2), rescale_adapter_scale(model, 5):
        assert layer.scaling["default"] == 15
    assert layer.scaling["default"] == 1.5


def test_dora_follows_the_scale() -> None:
    model, other = lora(use_dora=True), lora(use_dora=True, lora_alpha=6)
    with torch.no_grad():
        model(X)
        with rescale_adapter_scale(model, 2):
            torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("multiplier", ["2", None, True, 1j])
def test_a_multiplier_is_a_number(multiplier: Any) -> None:
    with pytest.raises(TypeError, match="give a number"), rescale_adapter_scale(lora(), multiplier):
        pass


def test_models_without_scales_and_merged_ones_are_refused() -> None:
    with pytest.raises(AdapterNotFoundError, match="no LoRA layers") as caught, rescale_adapter_scale(support.Net(), 2):
        pass
    assert isinstance(caught.value, ValueError)
    model = lora()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"), rescale_adapter_scale(model, 2):
        pass


def test_scales_of_one_layer() -> None:
    layer = lora().base_model.model.last
    layer.set_scale("default", 4)
    assert layer.scaling["default"] == 6
    layer.set_scale("zz", 4)  # diffusers sets the scales of adapters that a layer may lack
    layer.scale_layer(0.5)
    layer.scale_layer(1)
    assert layer.scaling["default"] == 3
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == 6
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.5}


def test_scales_know_rslora_and_patterns() -> None:
    layer = lora(use_rslora=True, rank_pattern={"last": 4}, alpha_pattern={"last": 10}).base_model.model.last
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == pytest.approx(15)


def test_only_adapters_in_use_are_scaled_by_layer() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["last"]))
    model.base_model.model.last.scale_layer(2)
    assert model.base_model.model.last.scaling == {"default": 3, "other": 1.5}


# ---- dtypes ---------------------------------------------------------------------------------------------------------------


def test_inputs_are_not_cast_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert disable_input_dtype_casting is core_disable_input_dtype_casting
    model = adapted(LoraConfig(r=2, target_modules=["last"]))
    layer = model.base_model.model.last
    half = X.to(torch.bfloat16)
    assert layer.cast_input(half, torch.float32).dtype is torch.float32

    def fail() -> None:
        with disable_input_dtype_casting(model):
            assert layer.cast_input(half, torch.float32) is half
            with disable_input_dtype_casting(model):
                pass
            assert layer.cast_input(half, torch.float32) is half  # the inner block leaves what the outer one did
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert layer.cast_input(half, torch.float32).dtype is torch.float32
    with disable_input_dtype_casting(model, active=False):
        assert layer.cast_input(half, torch.float32).dtype is torch.float32


def test_lora_computes_in_the_dtype_of_its_input_in_any_case() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(OneLayer(nn.Linear(4, 4).bfloat16()), LoraConfig(r=2, target_modules=["target"], init_lora_weights=False)).eval()
    half = X.bfloat16()
    with torch.no_grad():
        expected = model(half)
        with disable_input_dtype_casting(model):
            found = model(half)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


# ---- DoRA -----------------------------------------------------------------------------------------------------------------


def test_norms_in_a_cache_scope_and_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(use_dora=True).double()  # of small layers in float32 a scope holds the whole weight instead
    calls: list[int] = []
    original = Dora.norms
    monkeypatch.setattr(Dora, "norms", lambda self, *args: (calls.append(1), original(self, *args))[1])
    with torch.no_grad():
        outputs = [model(X.double()) for _ in range(3)]
        assert len(calls) == 3
        with cached(model):
            outputs += [model(X.double()) for _ in range(3)]
            assert len(calls) == 4
            with DoraCaching(enabled=False):
                outputs += [model(X.double()) for _ in range(2)]
                assert len(calls) == 6
                with DoraCaching():
                    model(X.double())
                    assert len(calls) == 6
            model(X.double())
            assert len(calls) == 6
        model(X.double())
        assert len(calls) == 7
    assert all(torch.equal(output, outputs[0]) for output in outputs)

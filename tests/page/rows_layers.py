"""§7.2: the members of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from page.making import LAYERS, config, fresh, get_peft_config, get_peft_model, made, mixed, over, pair, refused, run, same, tiny
from peft_core import BaseTunerLayer

Q = "model.layers.0.self_attn.q_proj"
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


def _layer(model: nn.Module) -> Any:
    return model.get_base_model().get_submodule(Q)  # type: ignore[operator]


@over(*LAYERS)
def layers_are_tuner_layers(kind: str) -> None:
    model = made(kind)
    assert isinstance(_layer(model), BaseTunerLayer)
    assert not isinstance(_layer(model).base_layer, BaseTunerLayer)
    assert sum(isinstance(module, BaseTunerLayer) for module in model.modules()) == 4


@over(*LAYERS)
def base_is_under_it(kind: str) -> None:
    base = tiny()
    original = base.get_submodule(Q)
    layer = _layer(get_peft_model(base, config(kind)))
    assert layer.base_layer is original
    assert layer.get_base_layer() is original
    assert layer.weight is original.weight
    assert layer.bias is original.bias
    assert layer.get_base_weight() is original.weight


def nesting_is_unwrapped() -> None:
    model = mixed("lora", "loha")
    layer = _layer(model)
    assert isinstance(layer.base_layer, BaseTunerLayer)
    assert type(layer.get_base_layer()) is nn.Linear


def biases_are_the_bases() -> None:
    model = fresh("lora", "bert-seq-cls")
    layer: Any = model.get_base_model().get_submodule("bert.encoder.layer.0.attention.self.query")
    assert layer.bias is layer.base_layer.bias


@over(*LAYERS)
def active_ones_are_told(kind: str) -> None:
    model = pair(kind)
    layer = _layer(model)
    assert layer.active_adapters == ["a"]
    assert layer.active_adapter == ["a"]
    layer.set_adapter(["a", "b"])
    assert layer.active_adapters == ["a", "b"]
    layer.set_adapter("b")
    assert layer.active_adapters == layer.active_adapter == ["b"]


@over(*LAYERS)
def merged_ones_are_told(kind: str) -> None:
    layer = _layer(pair(kind))
    assert (layer.merged, layer.merged_adapters) == (False, [])
    layer.merge()
    assert (layer.merged, layer.merged_adapters) == (True, ["a"])
    layer.unmerge()
    assert (layer.merged, layer.merged_adapters) == (False, [])


@over(*LAYERS)
def merge_takes_names(kind: str) -> None:
    layer = _layer(pair(kind))
    expected, weight = layer(X), layer.weight.clone()
    layer.merge(safe_merge=True)
    assert same(layer(X), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["b"]
    assert same(layer.weight, weight + layer.get_delta_weight("b"))


@over(*LAYERS)
def names_of_weights_are_listed(kind: str) -> None:
    layer = _layer(pair(kind))
    assert isinstance(layer.adapter_layer_names, tuple)
    held = {name for name in layer.adapter_layer_names if "a" in getattr(layer, name, ())}
    assert held == ({"lora_A", "lora_B"} if kind == "lora" else {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    assert isinstance(layer.other_param_names, tuple)
    expected = {"r", "lora_alpha", "scaling", "lora_dropout"} if kind == "lora" else {"r", "alpha", "scaling", "rank_dropout", "module_dropout"}
    assert expected <= set(layer.other_param_names)
    assert all("a" in getattr(layer, name) for name in expected)


@over(*LAYERS)
def one_layer_can_be_set_and_frozen(kind: str) -> None:
    model = pair(kind)
    layer = _layer(model)
    other: Any = model.get_base_model().get_submodule(Q.replace("0", "1"))
    layer.set_adapter("b")
    assert _flags(layer) == {"a": {False}, "b": {True}}
    assert _flags(other) == {"a": {True}, "b": {False}}
    layer.set_adapter("a", inference_mode=True)
    assert _flags(layer) == {"a": {False}, "b": {False}}
    layer.set_requires_grad(["a", "b"])
    assert _flags(layer) == {"a": {True}, "b": {True}}
    layer.set_requires_grad("b", requires_grad=False)
    assert _flags(layer) == {"a": {True}, "b": {False}}


def _flags(layer: Any) -> dict[str, set[bool]]:
    return {name: {p.requires_grad for key, p in layer.named_parameters() if name in key.split(".")} for name in "ab"}


@over(*LAYERS)
def one_layer_can_be_switched_off(kind: str) -> None:
    layer = _layer(made(kind))
    expected = layer(X)
    assert layer.disable_adapters is False
    layer.enable_adapters(False)
    assert layer.disable_adapters is True
    assert torch.equal(layer(X), layer.base_layer(X))
    layer.enable_adapters(True)
    assert torch.equal(layer(X), expected)


@over(*LAYERS)
def one_layer_can_lose_an_adapter(kind: str) -> None:
    layer = _layer(pair(kind))
    layer.delete_adapter("a")
    assert layer.active_adapters == ["b"]
    assert not any("a" in getattr(layer, name, ()) for name in (*layer.adapter_layer_names, *layer.other_param_names))


@over(*LAYERS)
def base_weights_can_be_replaced(kind: str) -> None:
    layer = _layer(made(kind))
    delta = layer(X) - layer.base_layer(X)
    layer.set_base_weight(torch.zeros_like(layer.weight))
    assert not layer.get_base_weight().any()
    assert same(layer(X), delta)


@over(*LAYERS)
def layers_say_whether_they_become_lora(kind: str) -> None:
    assert _layer(made(kind)).supports_lora_conversion()
    assert _layer(made(kind, name="mine")).supports_lora_conversion("mine")


# ---- LoRA ------------------------------------------------------------------------------------------------------------
def lora_has_dicts_by_adapter() -> None:
    model = made("lora", name="a", r=2, lora_alpha=6)
    with pytest.warns(UserWarning, match="can't be merged"):  # the base has no bias
        model.add_adapter("b", config("lora", r=3, use_rslora=True, lora_dropout=0.5, lora_bias=True))
    layer = _layer(model)
    assert layer.r == {"a": 2, "b": 3}
    assert layer.lora_alpha == {"a": 6, "b": 4}
    assert layer.scaling["a"] == 3
    assert layer.scaling["b"] == pytest.approx(4 / 3**0.5)
    assert layer.use_rslora == {"a": False, "b": True}
    assert {name: bool(flag) for name, flag in layer.use_dora.items()} == {"a": False, "b": False}
    assert layer.lora_bias == {"a": False, "b": True}
    assert set(layer.lora_dropout) == {"a", "b"}
    assert layer.lora_A["a"].weight.shape == (2, 32)
    assert layer.lora_B["b"].weight.shape == (32, 3)
    assert layer.lora_B["b"].bias.shape == (32,)


def embeddings_have_factors_of_their_own() -> None:
    layer: Any = made("lora", target_modules=["embed_tokens"]).get_base_model().model.embed_tokens
    assert layer.lora_embedding_A["default"].shape == (2, 64)
    assert layer.lora_embedding_B["default"].shape == (32, 2)


def dora_has_lengths() -> None:
    layer = _layer(fresh("lora", use_dora=True))
    assert layer.use_dora == {"default": True}
    assert same(layer.lora_magnitude_vector["default"].weight.flatten(), layer.weight.norm(dim=1))


def scales_of(kind: str) -> Callable[[], None]:
    """Return a check that the scales of a method's layers can be set, multiplied and set back."""

    def scales_are_changed() -> None:
        _check_scales(kind)

    return scales_are_changed


def _check_scales(kind: str) -> None:
    layer = _layer(pair(kind))
    usual = layer.scaling["a"]
    assert usual == (2 if kind == "lora" else 1.5)
    layer.set_scale("a", 3)
    assert layer.scaling == {"a": 3 * usual, "b": usual}
    layer.scale_layer(2)
    assert layer.scaling == {"a": 6 * usual, "b": usual}
    layer.unscale_layer(4)
    assert layer.scaling == {"a": 1.5 * usual, "b": usual}
    layer.unscale_layer()
    assert layer.scaling == {"a": usual, "b": usual}
    layer.set_scale("nobody", 3)
    assert set(layer.scaling) == {"a", "b"}


@over(*LAYERS)
def deltas_are_those_of_the_formula(kind: str) -> None:
    layer = _layer(pair(kind))
    if kind == "lora":
        expected = 2 * layer.lora_B["b"].weight @ layer.lora_A["b"].weight
    else:
        parts = {name: getattr(layer, f"hada_{name}")["b"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        expected = 1.5 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    assert same(layer.get_delta_weight("b"), expected)


# ---- LoHa ------------------------------------------------------------------------------------------------------------
def loha_has_dicts_by_adapter() -> None:
    model = made("loha", name="a", r=2, alpha=3)
    model.add_adapter("b", config("loha", r=3, alpha=3, rank_dropout=0.25, module_dropout=0.5))
    layer = _layer(model)
    assert layer.r == {"a": 2, "b": 3}
    assert layer.alpha == {"a": 3, "b": 3}
    assert layer.scaling == {"a": 1.5, "b": 1.0}
    assert layer.rank_dropout == {"a": 0.0, "b": 0.25}
    assert layer.module_dropout == {"a": 0.0, "b": 0.5}
    assert layer.hada_w1_a["b"].shape == (32, 3)
    assert layer.hada_w2_b["b"].shape == (3, 32)


def loha_has_cores_of_convolutions() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3))
    own = get_peft_config({"peft_type": "LOHA", "r": 2, "target_modules": ["0"], "use_effective_conv2d": True})
    layer: Any = get_peft_model(base, own).get_base_model()[0]
    assert layer.hada_t1["default"].shape == (2, 2, 3, 3)
    assert layer.hada_t2["default"].shape == (2, 2, 3, 3)


# ---- forward rules ---------------------------------------------------------------------------------------------------
@over(*LAYERS)
def merged_only_the_base_runs(kind: str) -> None:
    layer = _layer(made(kind))
    layer.merge()
    assert torch.equal(layer(X), layer.base_layer(X))


@over(*LAYERS)
def disabled_it_is_unmerged(kind: str) -> None:
    model = made(kind)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    assert torch.equal(run(model), run(tiny()))
    assert model.get_model_status().merged_adapters == []
    layer = _layer(made(kind))
    expected = layer.base_layer(X)
    layer.merge()
    layer.enable_adapters(False)
    assert not layer.merged
    assert torch.equal(layer(X), expected)


@over(*LAYERS)
def active_ones_are_added(kind: str) -> None:
    model = pair(kind)
    layer = _layer(model)
    model.set_adapter(["a", "b"])
    expected = layer.base_layer(X) + X @ (layer.get_delta_weight("a") + layer.get_delta_weight("b")).T
    assert same(layer(X), expected, atol=1e-4)


@over(*LAYERS)
def results_have_the_dtype_of_the_base(kind: str) -> None:
    layer = _layer(get_peft_model(tiny().bfloat16(), config(kind)))
    assert layer(X.bfloat16()).dtype == torch.bfloat16


def unknown_deltas_are_refused() -> None:
    with refused(ValueError, "nobody"):
        _layer(made("lora")).get_delta_weight("nobody")

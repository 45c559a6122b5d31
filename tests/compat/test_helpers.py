"""Small functions that libraries import from `peft`: what they do, not only that they are there."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_adapters_to_merge, check_target_module_exists, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules, get_quantization_config
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type, init_empty_weights
from peft.utils.other import get_pattern_key


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))


def adapted() -> tuple[Any, Any]:
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return model, model.get_base_model()[0]


def test_a_module_by_its_path() -> None:
    model = net()
    assert _get_submodules(model, "1.0") == (model[1], model[1][0], "0")
    assert _get_submodules(model, "1") == (model, model[1], "1")
    with pytest.raises(AttributeError, match=r"Sequential has no module '1\.1'"):
        _get_submodules(model, "1.1")


@pytest.mark.parametrize(("key", "found"), [("model.q_proj", "q_proj"), ("model.xq_proj", "model.xq_proj"), ("layers.3.mlp", r"layers\.\d.mlp")])
def test_the_pattern_that_matches(key: str, found: str) -> None:
    assert get_pattern_key(["q_proj", r"layers\.\d.mlp", ".*mlp"], key) == found


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"target_modules": ["q_proj"]}, [True, True, False]),
        ({"target_modules": r".*\.1\..*"}, [False, True, True]),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]}, [True, True, False]),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}, [False, True, True]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, [True, False, False]),
    ],
)
def test_whether_a_config_chooses_a_module(fields: dict[str, Any], chosen: list[bool]) -> None:
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.up_proj"]
    assert [bool(check_target_module_exists(peft.LoraConfig(**fields), name)) for name in names] == chosen


def test_all_linear_is_written_out() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    config = peft.LoraConfig(target_modules="all-linear")
    assert _maybe_include_all_linear_layers(config, model) is config
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert config.target_modules == linear
    named = peft.LoraConfig(target_modules=["q_proj"])
    assert _maybe_include_all_linear_layers(named, model).target_modules == {"q_proj"}


def test_what_is_left_to_merge() -> None:
    model, layer = adapted()
    assert check_adapters_to_merge(layer) == ["a"]
    assert check_adapters_to_merge(layer, ["b", "a"]) == ["b", "a"]
    layer.merge()
    with pytest.warns(UserWarning, match="Already following adapters were merged a"):
        assert check_adapters_to_merge(layer, ["b", "a"]) == ["b"]
    with pytest.raises(ValueError, match="is one name"):
        check_adapters_to_merge(layer, "a")
    model.unmerge_adapter()


def test_weights_that_were_moved_away_come_back_and_changes_stay() -> None:
    model = cpu_offload(net(), execution_device=torch.device("cpu"))
    layer = model[0]
    assert layer.weight.is_meta
    with onload_layer(layer):
        assert not layer.weight.is_meta
        layer.weight.data.fill_(2.0)
    assert layer.weight.is_meta
    x = torch.ones(1, 4)
    bias = net()[0].bias
    torch.testing.assert_close(layer(x), 8 + bias.expand(1, 4))
    plain = net()[0]
    with onload_layer(plain):
        assert not plain.weight.is_meta


@pytest.mark.parametrize("buffers", [None, True])
def test_modules_without_memory(buffers: bool | None) -> None:
    with init_empty_weights(include_buffers=buffers):
        norm = nn.BatchNorm1d(3)
    assert norm.weight.is_meta
    assert norm.running_mean is not None
    assert norm.running_mean.is_meta is bool(buffers)
    assert not nn.Linear(1, 1).weight.is_meta


def test_parameters_of_deepspeed_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Gathered:
        def __init__(self, parameters: list[Any], **options: Any) -> None:
            seen.append((parameters, options))

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=Gathered)))
    plain, spread = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    spread.ds_id = 1  # type: ignore[attr-defined]
    with gather_params_ctx(plain):
        assert seen == []
    with gather_params_ctx(spread, modifier_rank=None):
        assert seen == [([spread], {"modifier_rank": None, "fwd_module": None})]


class Halved(nn.Linear):
    """Keeps its weight as integers, in halves."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*reversed(weight.shape), bias=False)
        self.weight = nn.Parameter((weight * 2).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) / 2).T


def test_weights_in_numbers() -> None:
    values = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -3.0]])
    assert torch.equal(dequantize_module_weight(Halved(values)), values)
    plain = nn.Linear(3, 2)
    assert torch.equal(dequantize_module_weight(plain), plain.weight)
    _, layer = adapted()
    assert torch.equal(dequantize_module_weight(layer), layer.get_base_weight())
    with pytest.raises(ValueError, match="a ReLU has no floating-point weight"):
        dequantize_module_weight(nn.ReLU())


def test_parameters_of_bitsandbytes() -> None:
    assert get_bnb_param_type(nn.Parameter(torch.zeros(1))) is False
    for name, bits in (("Params4bit", "4bit"), ("Int8Params", "8bit")):
        assert get_bnb_param_type(type(name, (nn.Parameter,), {})(torch.zeros(1))) == bits


@pytest.mark.parametrize("there", [False, True])
def test_whether_bitsandbytes_is_there(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("bitsandbytes")
    module.__spec__, module.nn = types.SimpleNamespace(), types.SimpleNamespace(Linear4bit=object)
    if there:
        monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    else:
        monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert is_bnb_available() is is_bnb_4bit_available() is there


def test_the_config_of_a_quantised_model() -> None:
    model: Any = nn.Linear(1, 1)
    assert get_quantization_config(model, "gptq") is None
    settings = types.SimpleNamespace(quant_method="gptq")
    model.config = types.SimpleNamespace(quantization_config=settings)
    assert get_quantization_config(model, "gptq") is settings
    assert get_quantization_config(model, "awq") is None


def test_default_targets() -> None:
    assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"] == ["q_proj", "v_proj"]

"""Around training: which layers to adapt (KappaTune), how fast each factor learns (LoRA+), classes that stand for methods and base layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peft_core import ConfigError, ModelError, PeftWarning, get_peft_model
from peft_core.testing import tiny
from peft_lora import LoraConfig, LoraModel, create_loraplus_optimizer, find_kappa_target_modules
from peft_lora.tools.kinds import Linear4bit, Linear8bitLt, TorchaoLoraLinear


def stretched(*ratios: float) -> nn.Module:
    """Return a model whose Linears have these condition numbers, in this order."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in ratios))
    for layer, ratio in zip(net, ratios, strict=True):
        turn = torch.linalg.qr(torch.randn(3, 3)).Q
        layer.weight.data = turn @ torch.diag(torch.tensor([ratio, 1.0, 1.0])) @ torch.linalg.qr(torch.randn(3, 3)).Q
    return net


@pytest.mark.parametrize(("top_p", "names"), [(0.01, ["2"]), (0.5, ["2", "0"]), (1, ["2", "0", "3", "1"])])
def test_the_smallest_condition_numbers_come_first(top_p: float, names: list[str]) -> None:
    torch.manual_seed(0)
    found = find_kappa_target_modules(stretched(3, 9, 2, 5), top_p=top_p, show_progress=False)
    assert found == {"target_modules": names, "target_parameters": None}


def test_experts_are_parameters_and_count_with_their_mean() -> None:
    torch.manual_seed(0)
    net = nn.Module()
    net.plain = stretched(4)[0]
    net.experts = nn.Module()
    net.experts.up = nn.Parameter(torch.stack([torch.diag(torch.tensor([ratio, 1.0])) for ratio in (2.0, 4.0)]))  # 3 on average
    net.experts.down = nn.Parameter(torch.stack([torch.diag(torch.tensor([ratio, 1.0])) for ratio in (4.0, 8.0)]))
    found = find_kappa_target_modules(net, top_p=0.7, show_progress=False)
    assert found == {"target_modules": ["plain"], "target_parameters": ["experts.up"]}
    assert find_kappa_target_modules(net, 1, moe_param_suffixes=("down",), show_progress=False)["target_parameters"] == ["experts.down"]


def test_what_it_finds_is_a_config() -> None:
    config = LoraConfig(r=2, **find_kappa_target_modules(tiny(), top_p=0.2, show_progress=False))
    get_peft_model(tiny(), config)


def test_long_sides_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
    assert find_kappa_target_modules(net, 1, max_dim_size_to_analyze=8, show_progress=False)["target_modules"] == ["0"]
    with pytest.raises(ConfigError, match="no Linear and no experts with sides of at most 3"):
        find_kappa_target_modules(net, max_dim_size_to_analyze=3, show_progress=False)


@pytest.mark.parametrize("top_p", [0, -1, 1.1])
def test_a_share_is_a_share(top_p: float) -> None:
    with pytest.raises(ConfigError, match="is no share"):
        find_kappa_target_modules(tiny(), top_p=top_p)


def test_each_parameter_has_the_rate_of_its_group() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], lora_bias=False, use_dora=False, bias="all"))
    extra = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    for each in (model, extra):
        optimizer = create_loraplus_optimizer(
            each, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5, betas=(0.8, 0.9)
        )
        assert len(optimizer.param_groups) == 4
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        trained = {name: p for name, p in each.named_parameters() if p.requires_grad}
        assert len(group_of) == len(trained)
        for name, parameter in trained.items():
            group = group_of[id(parameter)]
            rate = 1e-5 if "embedding" in name else 16e-3 if "lora_B" in name or parameter.ndim == 1 else 1e-3
            assert group["lr"] == pytest.approx(rate), name
            assert group["weight_decay"] == (0 if "bias" in name else 0.1), name
            assert group["betas"] == (0.8, 0.9)


def test_it_steps() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 4e-2 if "lora_B" in name else 1e-2
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_bad_optimisers() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="is not positive"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1, loraplus_lr_ratio=0)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ModelError, match="nothing in the model trains"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1, loraplus_lr_ratio=2)


def test_a_base_with_lora_and_no_wrapper() -> None:
    base = tiny()
    model = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    assert model.model is base
    assert isinstance(model, LoraModel)
    assert model.active_adapters == ["mine"]
    assert list(base.peft_config) == ["mine"]
    assert LoraModel(tiny(), {"default": LoraConfig(target_modules=["q_proj"])}).active_adapter == "default"
    with pytest.raises(ConfigError, match="LoraModel takes a config of LORA, and there is none for 'mine'"):
        LoraModel(tiny(), {"r": 2}, "mine")  # type: ignore[dict-item]
    assert not isinstance(base, LoraModel)


class Linear8bit(nn.Linear):
    pass


Linear8bit.__name__ = "Linear8bitLt"


def test_layers_around_those_of_other_libraries() -> None:
    net: Any = nn.Sequential(Linear8bit(4, 4), nn.Linear(4, 4))
    get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    assert [isinstance(layer, Linear8bitLt) for layer in net] == [True, False]
    assert not any(isinstance(layer, (Linear4bit, TorchaoLoraLinear)) for layer in net)


def test_a_layer_shows_every_container_of_its_method() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert [len(getattr(net[0], name)) for name in net[0].adapter_layer_names] == [1, 1, 0, 0, 0]
    assert net[0].fan_in_fan_out is False


def test_layers_of_ones_own_at_a_config_are_layers_of_adapters() -> None:
    config = LoraConfig(target_modules=["0"])
    with pytest.warns(PeftWarning, match="the hook peft_make_layer"):
        config._register_custom_module({nn.LSTM: nn.Module})
    with pytest.raises(TypeError):
        get_peft_model(nn.Sequential(nn.LSTM(2, 2)), config)
    assert "custom" not in config.to_json()


def test_modules_that_somebody_puts_in_are_used() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    ids = torch.tensor([[1, 2, 3]])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        layer.lora_B["default"] = nn.Linear(4, 32, bias=False)
        expected = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)
        changed = model(input_ids=ids).logits
        assert not torch.equal(changed, plain)
        layer.lora_A.default = nn.Linear(32, 4, bias=False)
        assert not torch.equal(model(input_ids=ids).logits, changed)
    twin = copy.deepcopy(model)
    twin.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"] = nn.Linear(4, 32, bias=False)
    with torch.no_grad():
        assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_dropout_is_a_module_that_can_be_switched_off(options: dict[str, Any]) -> None:
    """Trainers of preferences set p = 0 in every `nn.Dropout` of a policy."""
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False, **options)).train()
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p == 0.5]
    assert len(dropouts) == 2
    for module in dropouts:
        module.p = 0.0
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_looking_at_dropouts_and_other_adapters_leave_them_on() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)).train()
    ids = torch.tensor([[1, 2, 3]])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    held = layer.lora_dropout
    assert layer.lora_dropout is held
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    assert isinstance(layer.lora_dropout["other"], nn.Identity)
    model.delete_adapter("other")
    assert layer.lora_dropout is held
    assert layer.lora_dropout["default"].p == layer.drop_rate("default") == 0.5
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dropout_that_is_put_in_later_acts() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.lora_dropout["default"], nn.Identity)
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

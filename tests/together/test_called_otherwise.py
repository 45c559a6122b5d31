"""Modules that are called by keywords, return tuples, set attributes of their own or name themselves otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import RoutingError, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_lora import LoraConfig

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1], [2, 2, 5, 3]])


def saved_attention() -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model.eval()


def test_a_saved_module_that_is_called_by_keywords() -> None:
    model = saved_attention()
    plain = tiny("llama")
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        rows = model(input_ids=IDS, adapter_names=["default", "__base__", "default"], use_cache=False).logits
        base = plain(input_ids=IDS).logits
        for layer in plain.model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.mul_(1.5)
        expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(rows[1], base[1])


def test_rows_of_a_saved_module_with_a_cache_are_refused() -> None:
    with torch.no_grad(), pytest.raises(RoutingError, match="with a cache"):
        saved_attention()(input_ids=IDS, adapter_names=["default", "__base__", "default"], use_cache=True)


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.aux_loss: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.aux_loss = self.weight.square().sum()
        return x @ self.weight.t()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Noting()
        self.last = nn.Linear(3, 2)

    def forward(this, x: Tensor) -> Tensor:
        found: Tensor = this.last(this.part(x))
        return found


def test_attributes_that_a_forward_sets_stay() -> None:
    config = get_peft_config({"peft_type": "LORA", "r": 2, "target_parameters": ["part.weight"], "init_lora_weights": False})
    model: Any = get_peft_model(Other(), config)
    model(torch.randn(2, 4))
    part = model.get_base_model().part
    torch.testing.assert_close(part.get_base_layer().aux_loss, part.changed(["default"]).square().sum())


def test_a_model_that_does_not_call_itself_self() -> None:
    model: Any = get_peft_model(Other(), LoraConfig(r=2, target_modules=["last"], init_lora_weights=False))
    x = torch.randn(2, 4)
    rows = model(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows[0], model(x)[0])

"""What is read from the base through a wrapper is written to the base through it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peft_core import get_peft_model
from support import CueConfig, dense, llama


class Settled(nn.Module):
    """A base with settings of all kinds."""

    kind = "class"

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.config = {"size": 4}
        self.held = 1

    @property
    def loss(self) -> Any:
        return self.config.get("loss")

    @loss.setter
    def loss(self, value: Any) -> None:
        self.config["loss"] = value

    @property
    def fixed(self) -> int:
        return 3

    def scale(self) -> int:
        return self.held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * self.scale()


@pytest.fixture(params=["wrapper", "base_model"])
def pair(request: pytest.FixtureRequest) -> Any:
    base = Settled()
    model = get_peft_model(base, dense(target_modules=["up"]))
    return (model if request.param == "wrapper" else model.base_model), base


@pytest.mark.parametrize(("name", "value"), [("config", {"size": 5}), ("held", 2), ("kind", "own"), ("loss", 7), ("scale", lambda: 9)])
def test_what_the_base_has(pair: Any, name: str, value: Any) -> None:
    model, base = pair
    setattr(model, name, value)
    assert getattr(base, name) == value
    assert getattr(model, name) == value
    assert name not in model.__dict__


def test_the_base_uses_it(pair: Any) -> None:
    model, base = pair
    x = torch.ones(1, 4)
    before = model(x)
    model.held = 3
    torch.testing.assert_close(model(x), 3 * before)
    del model.held
    assert "held" not in base.__dict__


@pytest.mark.parametrize(("name", "value"), [("mine", 1), ("_held", 1), ("fixed", 4), ("forward", lambda x: x), ("extra", nn.Linear(1, 1))])
def test_what_stays_on_the_wrapper(pair: Any, name: str, value: Any) -> None:
    model, base = pair
    before = getattr(base, name, None)
    setattr(model, name, value)
    assert getattr(model, name) is value
    assert getattr(base, name, None) == before


def test_layers_of_the_base_are_not_replaced_through_the_wrapper(pair: Any) -> None:
    model, base = pair
    wrapped = base.up
    model.up = nn.Linear(4, 4)
    assert base.up is wrapped


def test_copies(pair: Any) -> None:
    model, _ = pair
    model.held = 5
    twin = copy.deepcopy(model)
    twin.held = 6
    assert (model.held, twin.held) == (5, 6)


def test_a_generation_config() -> None:
    import transformers

    for config in (dense(target_modules=["q_proj"], task_type="CAUSAL_LM"), CueConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")):
        model: Any = get_peft_model(llama(), config).eval()
        model.generation_config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
        ids = torch.tensor([[3, 4, 5]])
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 5)
        hook = model.get_base_model().__dict__.get("prepare_inputs_for_generation")
        model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
        assert hook is None or model.get_base_model().__dict__["prepare_inputs_for_generation"] is hook

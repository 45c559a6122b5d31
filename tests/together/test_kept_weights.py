"""The merged weight that small layers keep in evaluation: never stale, the same bits in each call, left behind by copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import get_peft_config, get_peft_model
from peft_core.testing.helpers import randomise

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 3},
    "dora": {"peft_type": "LORA", "r": 3, "use_dora": True},
    "bias": {"peft_type": "LORA", "r": 3, "lora_bias": True},
    "loha": {"peft_type": "LOHA", "r": 2},
}


@pytest.fixture(params=ADAPTERS)
def ready(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """A model of one Linear that has been called, its layer, an input."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), get_peft_config({"target_modules": ["0"], **ADAPTERS[request.param]}))
    randomise(model, "default", 1)
    model.eval()
    x = torch.randn(2, 6)
    layer: Any = model.get_base_model()[0]
    check(model, layer, x)
    assert layer.kept_weights["default"].weight is not None
    return model, layer, x


def check(model: Any, layer: Any, x: Tensor) -> None:
    """Without gradients the kept weight answers, with gradients the adapter itself: both must say the same, twice."""
    expected = model(x).detach()
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def parameter(layer: Any) -> nn.Parameter:
    return list(layer.parameters_of("default").values())[-1]


def fill(tensor: Tensor) -> None:
    tensor.data.copy_(torch.randn_like(tensor))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in-place": lambda layer: parameter(layer).mul_(2),
    "one-entry": lambda layer: parameter(layer).view(-1)[1].add_(1),
    "through-data": lambda layer: fill(parameter(layer)),
    "data-replaced": lambda layer: setattr(parameter(layer), "data", torch.randn_like(parameter(layer))),
    "base": lambda layer: layer.get_base_layer().weight.mul_(2),
    "base-through-data": lambda layer: fill(layer.get_base_layer().weight),
    "base-bias": lambda layer: layer.get_base_layer().bias.add_(1),
    "scale": lambda layer: layer.set_scale("default", 3.0),
    "train-and-back": lambda layer: layer.train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_every_change(ready: Any, change: str) -> None:
    model, layer, x = ready
    with torch.no_grad():
        CHANGES[change](layer)
    check(model, layer, x)


def test_an_optimiser_step_is_seen(ready: Any) -> None:
    model, layer, x = ready
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().sum().backward()
    optimiser.step()
    check(model, layer, x)


def test_an_adapter_of_the_same_name_starts_anew(ready: Any) -> None:
    model, layer, x = ready
    config = copy.copy(model.peft_config["default"])
    model.add_adapter("other", copy.copy(config))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    randomise(model, "default", 9)
    model.set_adapter("default")
    check(model, layer, x)


def test_the_last_four_adapters_are_kept_and_each_answers_for_itself(ready: Any) -> None:
    model, layer, x = ready
    for seed, name in enumerate("abcde"):
        model.add_adapter(name, copy.copy(model.peft_config["default"]))
        randomise(model, name, seed + 5)
    for name in ("default", *"abcde", "a", "b", "default"):
        model.set_adapter(name)
        check(model, layer, x)
        assert len(layer.kept_weights) <= 4
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), layer.get_base_layer()(x))


def test_hooks_on_the_base_are_called(ready: Any) -> None:
    model, layer, x = ready
    seen: list[Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
    assert len(seen) == 1


def test_merging_passes_it_by(ready: Any) -> None:
    model, _, x = ready
    expected = model(x).detach()
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_leave_it_behind(ready: Any) -> None:
    model, layer, x = ready
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = twin.get_base_model()[0]
        with torch.no_grad():
            parameter(own).mul_(3)
        check(twin, own, x)
        check(model, layer, x)


def test_half_precision_keeps_nothing() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).bfloat16(), get_peft_config({"target_modules": ["0"], **ADAPTERS["lora"]})).eval()
    with torch.no_grad():
        model(torch.randn(1, 6).bfloat16())
    assert not model.get_base_model()[0].kept_weights

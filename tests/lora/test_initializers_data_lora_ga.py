"""LoRA-GA: a start from the gradients of the base, which is corrected by what the adapter takes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lora
from lora.data_net import BATCHES, Net, config, corda, run
from peft_core import ConfigError, PeftModel, PeftWarning, get_peft_model, inject_adapter_in_model
from peft_lora import LoraConfig, LoraGAConfig
from support import Unchanged


def loraga(targets: Any = ("a", "b", "c"), **settings: Any) -> LoraConfig:
    return config("lora_ga", targets, lora_ga_config=LoraGAConfig(**settings))


def step(model: nn.Module, times: int = 2) -> Callable[[], None]:
    def act() -> None:
        for batch in BATCHES[:times]:
            model(batch / 3).square().sum().backward()

    return act


def gradient(name: str, times: int = 2) -> Tensor:
    """The mean gradient of a weight as a matrix (out, in) in float64."""
    model = Net().double()
    for batch in BATCHES[:times]:
        model(batch.double() / 3).square().sum().backward()
    grad = getattr(model, name).weight.grad / times
    return grad.T if name == "c" else grad


INDICES = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}


@pytest.mark.parametrize("direction", [*INDICES, "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("name", ["a", "c"])
def test_lora_ga(direction: str, scale: str, name: str) -> None:
    base, original = Net(), Net()
    settings = loraga([name], direction=direction, scale=scale, stable_gamma=4)
    peft_lora.preprocess_loraga(base, settings, step(base))
    model = get_peft_model(base, settings)
    layer = getattr(model.base_model.model, name)
    a, b = (factor.detach().double() for factor in layer.factors("default"))
    s, matrix = layer.scaling["default"], layer.ops.matrix
    w, now = matrix(getattr(original, name).weight).detach().double(), matrix(layer.get_base_layer().weight).detach().double()
    u, _, vt = torch.linalg.svd(gradient(name), full_matrices=False)
    factor = {
        "stable": w.shape[0] ** 0.25 / 2,  # out, also of a Conv1D
        "weight_svd": float((torch.linalg.svdvals(w)[:2] / s).sqrt().mean()),
        "gd_scale": 1 / s,
        "unit": 1.0,
    }[scale]
    if direction == "random":
        # which ones is not said, but no direction goes to both
        found = [(a / factor) @ vt[:4].T, (b / factor).T @ u[:, :4]]
        chosen = [{int(i) for i in part.abs().argmax(1)} for part in found]
        assert not chosen[0] & chosen[1]
        assert all(part.abs().amax(1).sub(1).abs().max() < 1e-4 for part in found)
    else:
        for_a, for_b = INDICES[direction]
        torch.testing.assert_close(a.abs(), (factor * vt[for_a]).abs(), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(b.abs(), (factor * u[:, for_b]).abs(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(now + s * b @ a, w, atol=1e-6, rtol=0)


def test_the_first_step_of_lora_ga_does_not_depend_on_the_scale_of_the_loss() -> None:
    """The peer multiplies B by the gradient's singular values."""
    found = []
    for loss_scale in (1.0, 1000.0):
        base, settings = Net(), loraga(["a"])
        peft_lora.preprocess_loraga(base, settings, lambda base=base, size=loss_scale: (base(BATCHES[0]).square().sum() * size).backward())
        found.append(get_peft_model(base, settings).base_model.model.a.lora_B["default"].weight)
    torch.testing.assert_close(found[0].abs(), found[1].abs(), atol=1e-5, rtol=1e-4)


def test_preprocessing_puts_everything_back() -> None:
    base = Net().eval()
    base.b.weight.requires_grad_(False)
    base.a.bias.grad = torch.ones(8)
    state, grad = {name: p.requires_grad for name, p in base.named_parameters()}, base.a.bias.grad
    modes = []

    def act() -> None:
        modes.append(base.training)
        assert [name for name, p in base.named_parameters() if p.requires_grad] == ["a.weight", "b.weight"]
        step(base)()

    peft_lora.preprocess_loraga(base, loraga(["a", "b"]), act)
    assert modes == [True]
    assert not base.training
    assert {name: p.requires_grad for name, p in base.named_parameters()} == state
    assert base.a.bias.grad is grad
    assert base.a.weight.grad is None
    assert not base.a._forward_hooks

    def failing() -> None:
        raise RuntimeError("out of data")

    with Unchanged(base), pytest.raises(RuntimeError, match="out of data"):
        peft_lora.preprocess_loraga(base, loraga(["a"]), failing)


def test_gradients_are_means_over_passes_through_the_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    base = Twice()
    peft_lora.preprocess_loraga(base, loraga(["a"]), lambda: [base(batch).sum().backward() for batch in BATCHES[:3]])
    other = Twice()
    for batch in BATCHES[:3]:
        other(batch).sum().backward()
    torch.testing.assert_close(base.a._peft_loraga_grad, other.a.weight.grad / 6)


def test_lora_ga_files(tmp_path: Path) -> None:
    cache = str(tmp_path / "deep" / "gradients.pt")
    base = Net()
    peft_lora.preprocess_loraga(base, loraga(["a"]), step(base), cache)
    assert set(torch.load(cache)) == {"a._peft_loraga_grad"}
    other = Net()
    peft_lora.preprocess_loraga(other, loraga(["a"]), None, cache)
    assert torch.equal(other.a._peft_loraga_grad, base.a._peft_loraga_grad)
    with pytest.raises(ConfigError, match="no gradient for any target"):
        peft_lora.preprocess_loraga(other, loraga(["b"]), None, cache)


def test_lora_ga_from_a_file_needs_its_gradient(tmp_path: Path) -> None:
    base, settings = Net(), loraga()
    cache = str(tmp_path / "gradients.pt")
    peft_lora.preprocess_loraga(base, settings, step(base), cache)
    model = get_peft_model(base, settings)
    assert not hasattr(model.base_model.model.a.get_base_layer(), "_peft_loraga_grad")
    with torch.no_grad():
        model.base_model.model.a.lora_B["default"].weight.add_(0.1)
        expected = model(BATCHES[0])
    model.save_pretrained(tmp_path)
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=r"does not hold what the adapter took out of 'a'.*preprocess_loraga"):
        PeftModel.from_pretrained(base, tmp_path)  # the peer loads it onto the wrong base without a word
    peft_lora.preprocess_loraga(base, settings, None, cache)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(BATCHES[0]), expected, atol=1e-5, rtol=1e-5)


def test_layers_without_a_gradient_start_plainly_and_that_is_said() -> None:
    base, settings = Net(), loraga(["a", "idle"])
    with pytest.warns(PeftWarning, match="'idle' got no gradient"):
        peft_lora.preprocess_loraga(base, settings, step(base))
    layer = get_peft_model(base, settings).base_model.model.idle
    assert layer.lora_B["default"].weight.abs().max() == 0
    assert 0 < layer.lora_A["default"].weight.abs().max() <= 6**-0.5
    with pytest.warns(PeftWarning, match=r"'a' has no gradient from preprocess_loraga") as caught:
        get_peft_model(Net(), loraga(["a", "b"]))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "act", "message"),
    [
        (config("gaussian"), step, "init_lora_weights='lora_ga'"),
        (loraga(), lambda base: None, "no train_step"),
        (loraga(), lambda base: lambda: None, "no targeted weight has a gradient"),
    ],
    ids=["config", "step", "gradient"],
)
def test_what_lora_ga_refuses(settings: LoraConfig, act: Callable[[nn.Module], Any], message: str) -> None:
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=message):
        peft_lora.preprocess_loraga(base, settings, act(base))


def test_data_is_looked_at_before_the_adapter_is_added() -> None:
    model = get_peft_model(Net(), config("gaussian"))
    for act in (
        lambda: peft_lora.preprocess_loraga(model, loraga(), step(model)),
        lambda: peft_lora.preprocess_corda(model.base_model.model, corda(), run(model)),
    ):
        with Unchanged(model), pytest.raises(ConfigError, match="has adapters already; pass the base as it is before get_peft_model"):
            act()


def test_lora_ga_needs_two_directions_for_each_rank() -> None:
    base, settings = Net(), loraga(["c"])
    settings.r = 3
    peft_lora.preprocess_loraga(base, settings, step(base))
    with pytest.raises(ConfigError, match=r"needs 2r ≤ 5 on 'c', which is \(5, 8\), not r=3"):
        get_peft_model(base, settings)


def test_lora_ga_of_unknown_scaling_and_of_a_quantised_base() -> None:
    base = Net()
    with pytest.raises(ConfigError, match="like='pefd' is unknown; did you mean 'peft'"):
        peft_lora.preprocess_loraga(base, loraga(), step(base), like="pefd")
    base.a.weight = nn.Parameter(base.a.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="'a' is quantised"):
        peft_lora.preprocess_loraga(base, loraga(), step(base))


@pytest.mark.parametrize("strict", [True, "warn", False])
@pytest.mark.parametrize("low_memory", [True, False])
def test_a_file_is_refused_on_the_original_base_in_every_strictness(strict: Any, low_memory: bool, tmp_path: Path) -> None:
    settings, base = loraga(), Net()
    peft_lora.preprocess_loraga(base, settings, step(base))
    get_peft_model(base, settings).save_pretrained(tmp_path)
    base = Net()
    with pytest.raises(ConfigError, match="a file does not hold"):
        PeftModel.from_pretrained(base, tmp_path, strict=strict, low_cpu_mem_usage=low_memory)
    assert not [module for module in base.modules() if hasattr(module, "base_layer")]


def test_other_loaders_are_refused_too() -> None:
    """transformers' `load_adapter` injects the file's config for inference, and fills in the tensors afterwards."""
    config = LoraConfig(r=2, target_modules=["a"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), inference_mode=True)
    with pytest.raises(ConfigError, match="a file does not hold"):
        inject_adapter_in_model(config, Net())

"""Variants call A, B and dropout as modules, too, unless they have just been seen to be plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_core import ModelError, PeftModel, cached, get_peft_model
from peft_core.testing import tiny
from peft_lora import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    VeloraConfig,
    create_arrow_model,
)

from .variants_net import base, close, inputs, layer_of, made

pytestmark = pytest.mark.filterwarnings("ignore:lora_bias=True, and")  # nothing is merged where the base has no bias

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": KasaConfig()},
    "qalora": {"use_qalora": True, "qalora_group_size": 2},
    "bdlora, blocks in A": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2)},
    "bdlora, blocks in B": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "velora": {"velora_config": VeloraConfig()},
}
every = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def part_of(layer: Any, part: str, adapter: str = "default") -> nn.Module:
    found: nn.Module = {"A": layer.lora_A, "B": layer.lora_B, "dropout": layer.lora_dropout}[part][adapter]
    return found


def called(model: PeftModel, *, training: bool = False, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    found: Tensor = layer_of(model.train(training))(inputs())
    return found


@pytest.mark.parametrize(
    ("fields", "bias"),
    [
        pytest.param(fields, bias, id=f"{name}{', lora_bias' * bias}")
        for name, fields in VARIANTS.items()
        for bias in (False, True)
        if not (bias and name == "dora")
    ],
)
@modes
@pytest.mark.parametrize("part", ["A", "B", "dropout"])
def test_hooks_fire(fields: dict[str, Any], training: bool, bias: bool, part: str) -> None:
    model = made(**fields, lora_bias=bias)
    expected = called(model, training=training)
    calls: list[str] = []
    part_of(layer_of(model), part).register_forward_hook(lambda *args: calls.append("after"))
    if part == "A" and training and "velora_config" in fields:
        with pytest.raises(ModelError, match="VeLoRA"):
            called(model, training=training)
        return
    close(called(model, training=training), expected)
    assert calls == ["after"]
    with torch.no_grad(), cached(model):
        close(called(model, training=False), called(model, training=False))
    assert len(calls) == 3


@every
def test_what_a_hook_returns_counts(fields: dict[str, Any]) -> None:
    model = made(**fields)
    bare = called(model) * 0 + layer_of(model).base_layer(inputs())
    part_of(layer_of(model), "B").register_forward_hook(lambda module, args, output: output * 0)
    found = called(model)
    if "use_dora" in fields:
        f = layer_of(model).variants["default"].vector()
        bias: Any = layer_of(model).bias
        bare = (bare - bias) * f + bias
    close(found, bare)


@every
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_parametrised_factor_counts(fields: dict[str, Any], part: str) -> None:
    model = made(**fields)
    layer = layer_of(model)
    with torch.no_grad():
        part_of(layer, part).weight.mul_(2)  # type: ignore[operator]
    expected = called(model)
    with torch.no_grad():
        part_of(layer, part).weight.div_(2)  # type: ignore[operator]
    parametrize.register_parametrization(part_of(layer, part), "weight", Doubled())
    found = called(model)
    close(found, expected)
    found.square().sum().backward()
    inner = part_of(layer, part).parametrizations.weight.original  # type: ignore[union-attr]
    assert inner.grad is not None


@every
def test_a_replaced_factor_is_called(fields: dict[str, Any]) -> None:
    model = made(**fields)
    layer = layer_of(model)
    before = called(model)
    layer.lora_B["default"] = Bent(layer.lora_B["default"])
    assert not torch.allclose(called(model), before)


class Bent(nn.Module):
    """A module in the place of B that still has a weight."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.inner.weight
        return found

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


# ---- adapters that act on some tokens, and mixtures ------------------------------------------------------------------------
def routed(folder: Path, **fields: Any) -> tuple[PeftModel, Callable[[], Tensor]]:
    """Return a model with three experts and a router among them, and a call."""
    folders = []
    for number in range(3):
        folders.append(str(folder / str(number)))
        made(torch.float32, seed=number + 5, **fields).save_pretrained(folders[-1])
    model = create_arrow_model(base(torch.float32), folders, arrow_config=ArrowConfig(top_k=2)).eval()
    return model, lambda: layer_of(model)(inputs(torch.float32))


@pytest.mark.parametrize("part", ["A", "B"])
def test_experts_of_a_router_are_called(part: str, tmp_path: Path) -> None:
    model, call = routed(tmp_path)
    layer = layer_of(model)
    name = next(name for name in layer.lora_A if name != layer.selection.names[0])
    expected = call()
    calls: list[int] = []
    handle = part_of(layer, part, name).register_forward_hook(lambda *args: calls.append(1))
    close(call(), expected, 1e-5)
    assert calls
    handle.remove()
    part_of(layer, part, name).register_forward_hook(lambda module, args, output: output * 3)
    assert not torch.allclose(call(), expected, atol=1e-4)


def test_a_hooked_expert_drops_no_inputs_of_its_own_in_training(tmp_path: Path) -> None:
    model, call = routed(tmp_path, lora_dropout=0.5)
    layer = layer_of(model)
    model.train()
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    expected = call()
    name = next(name for name in layer.lora_A if name != layer.selection.names[0])
    part_of(layer, "B", name).register_forward_hook(lambda *args: None)
    close(call(), expected, 1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["", "lora_bias"])
def test_alora_calls_its_modules(bias: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5], init_lora_weights=False, lora_bias=bias)
    model = get_peft_model(tiny("llama"), config).eval()
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 6, 5, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        calls: list[int] = []
        for part in ("A", "B"):
            part_of(layer, part).register_forward_hook(lambda *args: calls.append(1))
        close(model(input_ids=ids).logits, expected, 1e-5)
        assert len(calls) == 2
        with model.disable_adapter():
            model(input_ids=ids)
        assert len(calls) == 2


# ---- where A and B are read --------------------------------------------------------------------------------------------------
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale.T


READ: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[nn.Module], Any]]] = {
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)),
        {"target_modules": ["0"]},
        lambda module: module(*[torch.randn(2, 3, 8)] * 3),
    ),
    "parameter": (lambda: nn.Sequential(Scaled()), {"target_parameters": ["scale"]}, lambda module: module(torch.randn(2, 6))),
}


@pytest.mark.parametrize("case", READ.values(), ids=READ)
@pytest.mark.parametrize("part", ["A", "B"])
def test_hooks_on_factors_that_are_read_are_an_error(case: Any, part: str) -> None:
    make, fields, call = case
    model: Any = get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, **fields))
    layer = model.get_base_model()[0]
    call(layer)
    handle = part_of(layer, part).register_forward_hook(lambda *args: None)
    with pytest.raises(ModelError, match="hooks"):
        call(layer)
    with model.disable_adapter():
        call(layer)
    handle.remove()
    call(layer)

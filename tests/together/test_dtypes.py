"""The dtype contract: products of the adapter are accumulated in its own dtype, and their sum with the base's output is rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import PeftConfig, get_peft_config, get_peft_model

R, INP, OUT = 4, 64, 48
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STD = pytest.mark.parametrize("std", [0.1, 0.5])


class Net(nn.Module):
    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.target(x)
        return found


def made(base: nn.Module, dtype: torch.dtype, std: float, **fields: Any) -> tuple[Any, Any]:
    config: PeftConfig = get_peft_config({"peft_type": "LORA", "r": R, "target_modules": ["target"], **fields})
    model: Any = get_peft_model(Net(base).to(dtype), config)
    layer = model.get_base_model().target
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.parameters_of("default").items():
            if "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            assert parameter.dtype is torch.float32
    return model, layer


def formula_lora(layer: Any, x: Tensor) -> Tensor:
    """In float32, from the base's own half-precision output."""
    a, b = layer.factors("default")
    return layer.base_layer(x).float() + layer.scaling["default"] * (x.float() @ a.t()) @ b.t()


def formula_dora(layer: Any, x: Tensor) -> Tensor:
    a, b = layer.factors("default")
    m, w, bias, s = layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight, layer.base_layer.bias, layer.scaling["default"]
    f = (m / (w.double() + s * b.double() @ a.double()).norm(dim=1).detach()).float()
    plain = torch.nn.functional.linear(x, w).float()
    return f * (plain + s * (x.float() @ a.t()) @ b.t()) + bias.float()


def formula_loha(layer: Any, x: Tensor) -> Tensor:
    b1, a1, b2, a2 = layer.factors("default")
    return layer.base_layer(x).float() + layer.scaling["default"] * x.float() @ ((b1 @ a1) * (b2 @ a2)).t()


METHODS: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "lora": ({}, formula_lora),
    "dora": ({"use_dora": True}, formula_dora),
    "loha": ({"peft_type": "LOHA"}, formula_loha),
}
methods = pytest.mark.parametrize("method", METHODS)


def same_up_to_the_last_bit(found: Tensor, expected: Tensor) -> None:
    """Nearly all entries are equal to the last bit; sums in another order may fall on the other side of a rounding."""
    assert found.dtype is expected.dtype
    equal = float((found == expected).float().mean())
    assert equal > 0.99, f"only {equal:.1%} are equal"
    unit = torch.finfo(found.dtype).eps
    assert float((found.double() - expected.double()).detach().abs().max()) <= unit * float(expected.detach().double().abs().max())


@HALF
@STD
@methods
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_linear(method: str, std: float, dtype: torch.dtype, tokens: int, grad: bool) -> None:
    torch.manual_seed(0)
    fields, formula = METHODS[method]
    model, layer = made(nn.Linear(INP, OUT), dtype, std, **fields)
    x = torch.randn(1, tokens, INP).to(dtype)
    with torch.set_grad_enabled(grad):
        same_up_to_the_last_bit(model(x), formula(layer, x).to(dtype))


@HALF
@STD
@methods
def test_gradients(method: str, std: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fields, formula = METHODS[method]
    model, layer = made(nn.Linear(INP, OUT), dtype, std, **fields)
    x = torch.randn(2, 20, INP).to(dtype).requires_grad_()
    g = torch.randn(2, 20, OUT).to(dtype)
    parameters = list(layer.parameters_of("default").values())
    found = torch.autograd.grad(model(x), [x, *parameters], g)
    expected = torch.autograd.grad(formula(layer, x).to(dtype), [x, *parameters], g)
    for one, other, parameter in zip(found, expected, [x, *parameters], strict=True):
        assert one.dtype is parameter.dtype
        unit = torch.finfo(dtype).eps if parameter is x or method == "dora" else 1e-5
        assert float((one.double() - other.double()).abs().max()) <= 2 * unit * float(other.double().abs().max())


@methods
def test_small_gradients_of_float16_do_not_vanish(method: str) -> None:
    torch.manual_seed(0)
    model, layer = made(nn.Linear(INP, OUT), torch.float16, 0.1, **METHODS[method][0])
    x = (torch.randn(1, 20, INP) * 1e-3).half()
    (model(x) * 1e-4).sum().backward()
    for name, parameter in layer.parameters_of("default").items():
        assert float((parameter.grad == 0).float().mean()) < 0.1, name


@HALF
def test_embeddings_and_convolutions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, layer = made(nn.Embedding(20, 8), dtype, 0.5)
    ids = torch.arange(20)[None]
    a, b = layer.factors("default")
    same_up_to_the_last_bit(model(ids), (layer.base_layer(ids).float() + layer.scaling["default"] * (a.t()[ids] @ b.t())).to(dtype))
    model, layer = made(nn.Conv1d(6, 8, 3), dtype, 0.5)
    x = torch.randn(2, 6, 30).to(dtype)
    change = layer.lora_B["default"](layer.lora_A["default"](x.float()))
    same_up_to_the_last_bit(model(x), (layer.base_layer(x).float() + layer.scaling["default"] * change).to(dtype))


@HALF
@STD
def test_rows_under_different_adapters(dtype: torch.dtype, std: float) -> None:
    torch.manual_seed(0)
    model, layer = made(nn.Linear(INP, OUT), dtype, std)
    model.add_adapter("other", get_peft_config({"peft_type": "LORA", "r": R, "target_modules": ["target"], "init_lora_weights": False}))
    x = torch.randn(3, 1, INP).to(dtype)
    with torch.no_grad():
        found = model(x, adapter_names=["default", "__base__", "other"])
        for row, name in ((0, "default"), (2, "other")):
            with model.use_adapters(name):
                same_up_to_the_last_bit(found[row], model(x[row]))
        assert torch.equal(found[1], layer.base_layer(x)[1])


@HALF
@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.5), ("dora", 0.0), ("loha", 0.0)])
def test_no_copy_of_an_activation_lives_until_the_backward_pass(method: str, dropout: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fields = METHODS[method][0]
    model, _ = made(nn.Linear(INP, OUT), dtype, 0.1, **fields, **({"lora_dropout": dropout} if dropout else {}))
    model.train()
    saved: list[Tensor] = []
    x = torch.randn(2, 100, INP).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        y = model(x)
    y.float().sum().backward()
    wide = [tuple(t.shape) for t in saved if t.dtype is torch.float32 and t.numel() >= 200 * min(INP, OUT)]
    assert not wide

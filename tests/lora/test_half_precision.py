"""LoRA on half-precision bases: computed in half from float32 master weights, near the truth, with no float32 copy of the activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_core import get_peft_model
from peft_lora import LoraConfig

TOKENS, INP, OUT, R = 48, 64, 40, 4
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
VARIANTS = pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])


def layer_of(dtype: torch.dtype, **fields: Any) -> tuple[nn.Module, Any, Tensor]:
    """A model of one Linear, its adapter layer with random weights, and an input."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(INP, OUT)).to(dtype), LoraConfig(r=R, lora_alpha=8, target_modules=["0"], **fields))
    layer: Any = model.get_base_model()[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, layer, torch.randn(2, TOKENS // 2, INP).to(dtype)


def truth(layer: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameters in float64, by the formulas of LoRA and DoRA."""
    double = {name: p.detach().double().requires_grad_() for name, p in layer.parameters_of("default").items()}
    a, b = double["lora_A.weight"], double["lora_B.weight"]
    w, bias = layer.weight.double(), layer.bias.double()
    s = layer.scaling["default"]
    if "lora_magnitude_vector" in double:
        v = w + s * b @ a
        return x.double() @ (v * (double["lora_magnitude_vector"] / v.norm(dim=1).detach())[:, None]).T + bias, double
    y = x.double() @ w.T + bias + s * (x.double() @ a.T) @ b.T
    return y + s * double["lora_B.bias"] if "lora_B.bias" in double else y, double


@HALF
@VARIANTS
def test_outputs_and_gradients_are_right_up_to_rounding(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    model, layer, x = layer_of(dtype, **fields)
    unit = torch.finfo(dtype).eps
    expected, double = truth(layer, x)
    found = model(x)
    assert found.dtype == dtype
    assert float((found.double() - expected).detach().abs().max()) <= 2 * unit * float(expected.detach().abs().max())
    weights = torch.randn(OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, parameter in layer.parameters_of("default").items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        error = float((parameter.grad.double() - double[name].grad).abs().max())
        assert error <= 4 * unit * float(double[name].grad.abs().max()), f"{name}: {error}"


@HALF
def test_no_worse_than_with_copies_in_float32(dtype: torch.dtype) -> None:
    _, layer, x = layer_of(dtype)
    expected, _ = truth(layer, x)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    a, b = layer.factors("default")
    copied = (base.float() + layer.scaling["default"] * x.float() @ a.T @ b.T).to(dtype)
    ours, theirs = (float((y.double() - expected).detach().square().mean().sqrt()) for y in (layer(x), copied))
    assert ours <= 1.25 * theirs


class Watch(TorchDispatchMode):
    """Notes each float32 tensor that is as large as an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() >= TOKENS * min(INP, OUT):
                self.seen.append(str(func))
        return result


@HALF
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("train", [True, False])
def test_no_activation_is_copied_to_float32(dtype: torch.dtype, dropout: float, train: bool) -> None:
    model, _, x = layer_of(dtype, lora_dropout=dropout)
    model.train(train)
    with Watch() as watch:
        y = model(x.requires_grad_())
        if train:
            y.float().sum()  # what the watch must see
            before = list(watch.seen)
            y.sum().backward()
            assert watch.seen == before
        else:
            assert not watch.seen
    assert bool(watch.seen) is train

"""The quantised Linears that the tests go through, made by the real libraries, how their numbers are read without our code, and helpers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from peft_core import AdapterLayer, get_peft_config, get_peft_model

BOTH = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]}


@dataclass(frozen=True)
class Kind:
    """One way to quantise.

    Args:
        library: whose it is.
        make: a float32 Linear → the quantised layer with its numbers.
        read: a quantised layer → its matrix (out, in), by the library's own functions.
        bytes_of: a quantised layer → all tensors that make up its weight.
        loose: how far its product with an input may be from the product with `read`, relative to the largest output (kernels in half precision).
        layer: name of our class.
    """

    library: str
    make: Callable[[nn.Linear], nn.Module]
    read: Callable[[Any], Tensor]
    bytes_of: Callable[[Any], list[Tensor]]
    loose: float
    layer: str


def _four(**settings: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=plain.bias is not None, **settings)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return make


def _eight(plain: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=plain.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        holder = nn.Sequential(copy.deepcopy(plain))
        quantize_(holder, copy.deepcopy(config))
        return holder[0]

    return make


def _read_four(layer: Any) -> Tensor:
    twin = copy.deepcopy(layer)
    twin.state_dict()  # bitsandbytes puts the codes back into the usual order for this
    return bnb.functional.dequantize_4bit(twin.weight.data, twin.weight.quant_state).float()


def _read_eight(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).float()


def _bytes_of_eight(layer: Any) -> list[Tensor]:
    return [layer.weight.data, layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB]


def _bytes_of_four(layer: Any) -> list[Tensor]:
    state = layer.weight.quant_state
    return [layer.weight.data, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def _bytes_of_torchao(layer: Any) -> list[Tensor]:
    return [getattr(layer.weight, name) for name in layer.weight.tensor_data_names]


def _four_kind(**settings: Any) -> Kind:
    return Kind("bitsandbytes", _four(**settings), _read_four, _bytes_of_four, 2e-2, "Linear4bit")


def _torchao_kind(config: Any) -> Kind:
    return Kind("torchao", _torchao(config), lambda layer: layer.weight.dequantize().float(), _bytes_of_torchao, 1e-5, "TorchaoLinear")


KINDS = {
    "nf4": _four_kind(quant_type="nf4"),
    "nf4-one-level": _four_kind(quant_type="nf4", compress_statistics=False),
    "fp4": _four_kind(quant_type="fp4"),
    "int8": Kind("bitsandbytes", _eight, _read_eight, _bytes_of_eight, 2e-2, "Linear8bitLt"),
    "torchao-int8": _torchao_kind(Int8WeightOnlyConfig()),
    "torchao-int4": _torchao_kind(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


class Two(nn.Module):
    """Two quantised Linears, 64 → 128 → 64, with a nonlinearity between them."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = kind.make(nn.Linear(64, 128))
        self.second = kind.make(nn.Linear(128, 64, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, 64)."""
        return self.second(torch.tanh(self.first(x)))


# ---- what the tests do with them ----------------------------------------------------------------------------------------
def adapted(kind: Kind, **settings: Any) -> Any:
    """A model of two quantised layers with an adapter that does something."""
    model = get_peft_model(Two(kind), get_peft_config({**BOTH, **settings}))
    stir(model, "default")
    return model.eval()


def stir(model: Any, adapter: str, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            for parameter in layer.parameters_of(adapter).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw) * (1 if parameter.dim() > 1 else parameter.abs()))


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def out(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **kwargs)


def packed(model: Any, kind: Kind) -> list[Tensor]:
    return [tensor.clone() for layer in layers(model) for tensor in kind.bytes_of(layer.get_base_layer())]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))


def close(found: Tensor, expected: Tensor, share: float) -> None:
    worst = (found.double() - expected.double()).abs().max().item()
    assert worst <= share * expected.abs().max().item(), f"off by {worst:.2e}, where the largest is {expected.abs().max().item():.2e}"


def delta(layer: Any, adapter: str = "default") -> Tensor:
    """s·B·A in float64."""
    a, b = (factor.detach().double() for factor in layer.factors(adapter))
    return layer.scaling[adapter] * b @ a


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
